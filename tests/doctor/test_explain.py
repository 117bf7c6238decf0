"""`doctor.py explain`: codes and pasted messages."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from support import run_script

from cpm_bee import error_codes, language
from cpm_bee.doctor.explain import explain, find
from cpm_bee.errors import InputError

HAN = re.compile(r"[\u4e00-\u9fff]")
LABELS = {
    "en": ("cause", "fix", "example", "messages"),
    "zh": ("原因", "解决办法", "示例", "消息"),
}
ALL = list(error_codes.entries().values())


@pytest.fixture(autouse=True)
def _language_is_forgotten() -> Iterator[None]:
    yield
    language.choose(None)


@pytest.mark.parametrize("entry", ALL, ids=lambda e: e.code)
def test_an_entry_in_both_languages(entry: error_codes.Entry) -> None:
    for index, (flag, labels) in enumerate(LABELS.items()):
        text = explain([entry.code, "--lang", flag])
        assert text.startswith(f"{entry.code}  {entry.title[index]}\n")
        assert [line for line in labels if not re.search(f"^{line} ", text, re.M)] == []
        plain = re.sub(r"\s", "", text)
        for words in (entry.cause, entry.fix, entry.example, *entry.messages):
            assert re.sub(r"\s", "", words[index]) in plain
        assert bool(HAN.search(text.partition("example")[0])) == (flag == "zh")


@pytest.mark.parametrize("given", ["E201", "e201", "201", " E201 ", "error: x: no such file"])
def test_a_code_is_found(given: str) -> None:
    assert [entry.code for entry in find(given)] == ["E201"]


def test_several_codes_and_a_whole_message() -> None:
    assert [entry.code for entry in find("E201 e106, E201")] == ["E201", "E106"]
    pasted = (
        "error: this run cannot start: (explain: E201, E106)\n"
        "  --dataset x: no such folder; preprocess_dataset.py makes it"
    )
    assert [entry.code for entry in find(pasted)] == ["E201", "E106"]
    assert explain(["E201", "E106"]).count("cause ") == 2


@pytest.mark.parametrize(
    ("pasted", "code"),
    [
        ("error: rank 3 on node-1: v: holds no records", "E308"),
        ("data.jsonl:3: not valid JSON (Expecting value at column 3)", "E301"),
        ("  file: 没有任何记录", "E308"),
        ('错误: data.jsonl:3: 没有 "<ans>"（答案未知时写 ""）', "E306"),
        ("训练无法开始：\n  --load x: 没有这个检查点；由 preprocess_dataset.py 生成", "E501"),
    ],
)
def test_a_pasted_message_is_found_by_its_text(pasted: str, code: str) -> None:
    assert find(pasted)[0].code == code


def test_messages_of_all_codes_are_found() -> None:
    for entry in ALL:
        for words in entry.messages:
            values = {name: f"v{i}" for i, name in enumerate(re.findall(r"\{(\w+)\}", words.en))}
            pattern = error_codes.Pattern(words, None)
            assert entry in find(f"error: {pattern.english(values)}"), words.en
            assert entry in find(f"错误: {pattern.chinese(values)}"), words.zh


def test_all_codes_are_listed() -> None:
    for flag in ("en", "zh"):
        lines = explain(["--lang", flag]).splitlines()
        titles = [f"{e.code}  {e.title.zh if flag == 'zh' else e.title.en}" for e in ALL]
        assert lines[: len(ALL)] == titles
        assert "doctor.py explain CODE" in lines[-1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("E200", "there is no code E200; near it: E201, E202, E203"),
        ("E999", "there is no code E999; near it: "),
        ("0", "there is no code E000; near it: E101, E102, E103"),
        ("my cat sleeps", "no message has this text"),
    ],
)
def test_what_is_unknown(given: str, message: str) -> None:
    with pytest.raises(InputError) as raised:
        explain([given])
    assert message in str(raised.value)


def test_the_command() -> None:
    done = run_script("src/doctor.py", "explain", "E409", "--lang", "zh")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("E409  词表与模型不匹配\n")
    done = run_script("src/doctor.py", "explain", "E999")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is no code E999; near it: E")
