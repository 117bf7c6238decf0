from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import support
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT, RunScript

from cpm_bee.records import validate
from cpm_bee.tokenizer import escape

SCRIPT = "tutorials/basic_task_finetune/data_reformat.py"
QUESTION = "这段话形容了哪句诗的意境？"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("data_reformat", ROOT / SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


def raw(text: str, options: list[str], target: object = "0") -> dict:
    marked = "".join(f"[{i}]{option}" for i, option in enumerate(options))
    return {"target": target, "input": f"[翻译]{text}{marked}[答案]"}


def lines(*values: object) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def reason(value: object) -> str:
    with pytest.raises(script.BadInput) as caught:
        script.reformat(value)
    return str(caught.value)


# ------------------------------------------------------------------ one record


def test_the_example_of_the_specification() -> None:
    source = {"target": "3", "input": "[翻译]TEXT[0]A[1]B[2]C[3]D[答案]"}
    options = {"<option_0>": "A", "<option_1>": "B", "<option_2>": "C", "<option_3>": "D"}
    made = {"input": "TEXT", "options": options, "question": QUESTION, "<ans>": "<option_3>"}
    assert script.reformat(source) == made
    assert list(script.reformat(source)) == list(made)
    release = {"translation": "TEXT", "choices": ["A", "B", "C", "D"], "answer": 3}
    assert script.reformat(release) == made


parts = st.text(
    st.sampled_from("春<>[]x ") | st.characters(exclude_categories=["Cs"]), min_size=1
).filter(str.strip)


@given(parts, st.lists(parts, min_size=2, max_size=26), st.data())
def test_both_forms_give_the_same_valid_record(
    text: str, options: list[str], data: st.DataObject
) -> None:
    answer = data.draw(st.integers(0, len(options) - 1))
    release = script.reformat({"translation": text, "choices": options, "answer": answer})
    assert release["input"] == escape(text)
    assert list(release["options"].values()) == [escape(option) for option in options]
    assert list(release["options"]) == [f"<option_{i}>" for i in range(len(options))]
    assert release["<ans>"] == f"<option_{answer}>"
    assert validate(release) == []
    joined = text + "".join(options)
    # Numbers in brackets can also come about where two parts meet.
    if "[" not in joined and "]" not in joined:
        assert script.reformat(raw(text, options, str(answer))) == release
        assert script.reformat(raw(text, options, answer)) == release


@pytest.mark.parametrize(
    "value",
    [
        {"input": "[翻译]T[0]A[1]B[答案]"},
        raw("T", ["A", "B"], None),
        raw("T", ["A", "B"], ""),
        {"translation": "T", "choices": ["A", "B"]},
        {"translation": "T", "choices": ["A", "B"], "answer": None},
    ],
)
def test_without_an_answer(value: dict) -> None:
    assert script.reformat(value)["<ans>"] == ""
    assert validate(script.reformat(value)) == []


def test_brackets_in_texts() -> None:
    text = "见[1]及[注]、[2]、[01]、[ 0 ]、[100]"
    made = script.reformat(raw(text, ["甲[注]", "乙[99]", "丙[01]"], "2"))
    assert made["input"] == text
    assert list(made["options"].values()) == ["甲[注]", "乙[99]", "丙[01]"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("T[0]A[0]B[1]C", "found [0] where [1] or [答案] is expected"),
        ("T[0]A[2]B", "found [2] where [1] or"),
        ("T[0]A[2]B[1]C", "found [2] where [1] or"),
        ("T[0]A[1]B[1]C", "found [1] where [2] or"),
        ("T[0]A[1]B[0]C", "found [0] where [2] or"),
        ("T[0]A[1]B[3]C", "found [3] where [2] or"),
        ("T[1]A[2]B", "there is no [0]"),
        ("T", "there is no [0]"),
        ("T[0]A", "has 1 options, expected 2 to 26"),
        ("T" + "".join(f"[{i}]o" for i in range(27)), "has 27 options"),
        ("[0]A[1]B", "the text is empty"),
        (" [0]A[1]B", "the text is empty"),
        ("T[0][1]B", "option [0] is empty"),
        ("T[0]A[1]\n", "option [1] is empty"),
        ("T[翻译]U[0]A[1]B", "contains [翻译] more than once"),
        ("T[0]A[答案]x[1]B", "contains [答案] more than once"),
        ("T\ud800[0]A[1]B", "the text contains half of a surrogate pair"),
    ],
)
def test_ambiguous_or_malformed_markers(body: str, expected: str) -> None:
    assert expected in reason({"target": "0", "input": f"[翻译]{body}[答案]"})


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("2", '"target" is 2, the options are [0] to [1]'),
        (2, '"target" is 2'),
        (-1, '"target" is -1'),
        ("-1", "not the number of an option"),
        ("A", "not the number of an option"),
        ("1.0", "not the number of an option"),
        (1.0, "not the number of an option: 1.0"),
        (True, "not the number of an option: true"),
        (False, "not the number of an option: false"),
        ("１", "not the number of an option"),
        (" ", "not the number of an option"),
        ([0], "not the number of an option"),
    ],
)
def test_wrong_answers(target: object, expected: str) -> None:
    assert expected in reason(raw("T", ["A", "B"], target))
    release = {"translation": "T", "choices": ["A", "B"], "answer": target}
    assert expected.replace("target", "answer") in reason(release)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["a"], "expected a JSON object"),
        ({}, 'expected either "input" or'),
        ({"input": "x", "translation": "y"}, 'expected either "input" or'),
        ({"input": 3}, '"input" is not a text'),
        ({"input": "T[0]A[1]B[答案]"}, "does not begin with [翻译]"),
        ({"input": "[翻译]T[0]A[1]B"}, "does not end with [答案]"),
        ({"choices": ["A", "B"]}, '"translation" is missing'),
        ({"translation": "T"}, '"choices" is missing'),
        ({"translation": "T", "choices": "AB"}, '"choices" is missing or not a list'),
        ({"translation": "T", "choices": ["A", 1]}, "not a list of texts"),
        ({"translation": "T", "choices": ["A"]}, "has 1 options"),
        ({"translation": "T", "choices": ["A"] * 27}, "has 27 options"),
        ({**raw("T", ["A", "B"]), "answer": 0}, 'has both "target" and "answer"'),
    ],
)
def test_what_is_no_raw_record(value: object, expected: str) -> None:
    assert expected in reason(value)


# ------------------------------------------------------------------ as a user would


def test_all_of_ccpm(shared: Path, tmp_path: Path, run_script: RunScript) -> None:
    result = run_script(SCRIPT, "--input", shared / "ccpm", "--output", tmp_path / "bee_data")
    assert (result.returncode, result.stderr) == (0, "")
    made = {
        name: (tmp_path / "bee_data" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
        for name in ("train", "eval")
    }
    for name, found in made.items():
        source = (shared / "ccpm" / f"{name}.jsonl").read_text(encoding="utf-8")
        assert len(found) - 1 == len(source.splitlines()) > 0
    golden = shared / "golden" / "bin_small_blocks.jsonl"
    expected = golden.read_text(encoding="utf-8").splitlines()
    assert expected
    assert set(expected) <= {*made["train"], *made["eval"]}
    # Put together again, every line gives back its source.
    for name, found in made.items():
        with open(shared / "ccpm" / f"{name}.jsonl", encoding="utf-8") as sources:
            for source, line in zip(sources, found, strict=False):
                record = json.loads(line)
                assert validate(record) == []
                back = raw(record["input"], list(record["options"].values()), record["<ans>"][8:-1])
                assert back == json.loads(source)


@pytest.fixture
def tutorial(tmp_path: Path) -> Path:
    """A copy of the script alone, with raw data beside it."""
    (tmp_path / "tutorial" / "raw_data").mkdir(parents=True)
    shutil.copy(ROOT / SCRIPT, tmp_path / "tutorial")
    return tmp_path / "tutorial"


def run_copy(tutorial: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # -I keeps every path of this repository out: the script must stand alone.
    return subprocess.run(
        [sys.executable, "-I", "-X", "utf8", str(tutorial / "data_reformat.py"), *arguments],
        cwd="/",
        capture_output=True,
        encoding="utf-8",
        timeout=200,
    )


def test_defaults_lie_beside_the_script(tutorial: Path) -> None:
    content = lines(raw("a<b", ["<", "B"], "1"), raw("T", ["A", "B", "C"], 2))
    (tutorial / "raw_data" / "train.jsonl").write_text(content, encoding="utf-8")
    (tutorial / "raw_data" / "any name.jsonl").write_bytes(
        b"\xef\xbb\xbf" + content.replace("\n", "\r\n\r\n").encode()
    )
    (tutorial / "raw_data" / "notes.txt").write_text("no data")
    result = run_copy(tutorial)
    assert (result.returncode, result.stderr) == (0, "")
    assert "train.jsonl: 2 records" in result.stdout
    expected = (
        '{"input": "a<<b", "options": {"<option_0>": "<<", "<option_1>": "B"}, '
        f'"question": "{QUESTION}", "<ans>": "<option_1>"}}\n'
        '{"input": "T", "options": {"<option_0>": "A", "<option_1>": "B", "<option_2>": "C"}, '
        f'"question": "{QUESTION}", "<ans>": "<option_2>"}}\n'
    ).encode()
    made = {path.name: path.read_bytes() for path in (tutorial / "bee_data").iterdir()}
    assert made == {"train.jsonl": expected, "any name.jsonl": expected}


def test_the_data_folders_may_be_links_to_folders_not_there_yet(tutorial: Path) -> None:
    (tutorial / "raw_data" / "a.jsonl").write_text(lines(raw("T", ["A", "B"])), encoding="utf-8")
    (tutorial / "raw_data").rename(tutorial.parent / "raw_data")
    (tutorial / "raw_data").symlink_to("../raw_data")
    (tutorial / "bee_data").symlink_to("../bee_data")
    assert run_copy(tutorial).returncode == 0
    assert (tutorial.parent / "bee_data" / "a.jsonl").is_file()
    assert (tutorial / "bee_data").is_symlink()


def test_one_file_and_another_question(tutorial: Path, tmp_path: Path) -> None:
    source = tmp_path / "test.json"
    source.write_text(lines({"translation": "T", "choices": ["A", "B"]}), encoding="utf-8")
    result = run_copy(
        tutorial, "--input", str(source), "--output", str(tmp_path / "a" / "b"), "--question=a<b?"
    )
    assert result.returncode == 0, result.stderr
    [record] = map(json.loads, (tmp_path / "a" / "b" / "test.jsonl").read_text().splitlines())
    assert record["question"] == "a<<b?"
    assert record["<ans>"] == ""


def write_bad_files(tutorial: Path) -> None:
    good = lines(raw("T", ["A", "B"]))
    bad = "{\n[]\n" + lines(raw("T", ["A"])) + "[" * 100_000 + "\n1" + "1" * 5000 + "\n"
    (tutorial / "raw_data" / "train.jsonl").write_text(good + bad + good, encoding="utf-8")
    (tutorial / "raw_data" / "eval.jsonl").write_bytes(
        good.encode() + b"\xff\n" + good.encode() + b'{"input": "\xe6'
    )


def test_all_bad_lines_are_listed_and_nothing_written(tutorial: Path) -> None:
    write_bad_files(tutorial)
    (tutorial / "raw_data" / "fine.jsonl").write_text(lines(raw("T", ["A", "B"])), encoding="utf-8")
    result = run_copy(tutorial)
    assert (result.returncode, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr
    folder = tutorial / "raw_data"
    for expected in (
        "train.jsonl:2: not valid JSON (Expecting property name",
        "train.jsonl:3: expected a JSON object",
        "train.jsonl:4: has 1 options",
        "train.jsonl:5: not valid JSON",
        "train.jsonl:6: not valid JSON",
        "eval.jsonl:2: not UTF-8 text (at byte 0)",
        "eval.jsonl:4: not UTF-8 text (at byte 11)",
    ):
        assert f"{folder}/{expected}" in result.stderr
    assert "7 bad lines, nothing was written" in result.stderr
    assert "--skip-bad" in result.stderr
    assert not (tutorial / "bee_data").exists()

    (tutorial / "bee_data").mkdir()
    (tutorial / "bee_data" / "train.jsonl").write_text("old")
    assert run_copy(tutorial).returncode == 2
    assert [path.name for path in (tutorial / "bee_data").iterdir()] == ["train.jsonl"]
    assert (tutorial / "bee_data" / "train.jsonl").read_text() == "old"


@pytest.mark.parametrize("flag", ["--skip-bad", "--skip_bad"])
def test_skip_bad(tutorial: Path, flag: str) -> None:
    write_bad_files(tutorial)
    result = run_copy(tutorial, flag)
    assert (result.returncode, result.stderr) == (0, "")
    assert "train.jsonl: 2 records, 5 bad lines skipped" in result.stdout
    assert "eval.jsonl: 2 records, 2 bad lines skipped" in result.stdout
    assert len((tutorial / "bee_data" / "train.jsonl").read_text().splitlines()) == 2
    (tutorial / "raw_data" / "eval.jsonl").write_text("x\ny\n")
    (tutorial / "bee_data" / "eval.jsonl").unlink()
    result = run_copy(tutorial, flag)
    assert result.returncode == 2
    assert "eval.jsonl: holds no records, all of its 2 lines are bad" in result.stderr
    assert not (tutorial / "bee_data" / "eval.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--input", "{t}/nothing"], "nothing: no such file or folder"),
        (["--input", "{t}/empty"], "empty: looked for *.jsonl files, found none"),
        (["--input", "{t}/blank.jsonl"], "blank.jsonl: holds no records, it is empty"),
        (["--output", "{t}/raw_data"], "this is the raw file itself"),
        (["--output", "{t}/blank.jsonl"], "--output is a folder, this is a file"),
        (["--output", "{t}/occupied"], "a.jsonl: this is a folder"),
        (["--inp", "x"], "unrecognized arguments"),
    ],
)
def test_wrong_usage_is_told(tutorial: Path, arguments: list[str], expected: str) -> None:
    (tutorial / "raw_data" / "a.jsonl").write_text(lines(raw("T", ["A", "B"])), encoding="utf-8")
    (tutorial / "empty").mkdir()
    (tutorial / "occupied" / "a.jsonl").mkdir(parents=True)
    (tutorial / "blank.jsonl").write_text("\n")
    before = sorted(tutorial.rglob("*"))
    result = run_copy(tutorial, *(argument.format(t=tutorial) for argument in arguments))
    assert (result.returncode, result.stdout) == (2, "")
    assert expected in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(tutorial.rglob("*")) == before


def test_a_second_run_overwrites_with_the_same_bytes(tutorial: Path) -> None:
    (tutorial / "raw_data" / "a.jsonl").write_text(lines(raw("T", ["A", "B"])), encoding="utf-8")
    assert run_copy(tutorial).returncode == 0
    first = (tutorial / "bee_data" / "a.jsonl").read_bytes()
    assert run_copy(tutorial).returncode == 0
    assert (tutorial / "bee_data" / "a.jsonl").read_bytes() == first
    assert [path.name for path in (tutorial / "bee_data").iterdir()] == ["a.jsonl"]


# ------------------------------------------------------------------ what its author did not mean


def reformatted(path: Path, *arguments: str) -> subprocess.CompletedProcess:
    output = path.parent / "b e e"
    return support.run_script(SCRIPT, "--input", path, "--output", output, *arguments)


def test_lost_labels_are_counted_and_the_unused_keys_named(tmp_path: Path) -> None:
    release = {"translation": "T", "choices": ["A", "B"]}
    path = tmp_path / "train.jsonl"
    path.write_text(lines({**release, "label": 1}, {**release, "answer": 0}, {**release, "类": 0}))
    done = reformatted(path)
    assert done.returncode == 0
    assert "train.jsonl: 3 records" in done.stdout
    assert "2 of 3 records have no answer" in done.stderr
    assert 'keys that were not used: "label", "类"' in done.stderr


def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"translation": "T", "choices": ["A", "B"], "answer": 0, "answer": 1}\n')
    done = reformatted(path)
    assert done.returncode == 2
    assert 'train.jsonl:1: the key "answer" appears twice' in done.stderr
    assert not (tmp_path / "b e e").exists()


@pytest.mark.parametrize(("encoding", "name"), [("gbk", "GBK"), ("utf-16", "UTF-16")])
def test_another_encoding_is_named(tmp_path: Path, encoding: str, name: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(lines(raw("春眠不觉晓", ["甲", "乙"])).encode(encoding))
    done = reformatted(path)
    assert done.returncode == 2
    assert f"looks like {name}: iconv -f" in done.stderr


def test_a_json_array_is_one_problem_and_the_printed_command_works(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    values = [raw("春", ["甲", "乙"]), raw("夏", ["丙", "丁"], "1")]
    path.write_text(json.dumps(values, ensure_ascii=False, indent=1), encoding="utf-8")
    done = reformatted(path)
    assert done.returncode == 2
    assert "is a JSON array; one record per line" in done.stderr
    command = done.stderr.partition("\n")[2].strip().replace("python", sys.executable, 1)
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    again = reformatted(tmp_path / "train.lines.jsonl")
    assert again.returncode == 0 and "2 records" in again.stdout


def test_the_next_step_names_the_paths_of_this_run_and_works(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(lines(raw("春", ["甲", "乙"])), encoding="utf-8")
    command = reformatted(path).stdout.splitlines()[-1].partition("next: ")[2]
    done = subprocess.run(
        ["bash", "-c", command.replace("python", sys.executable, 1)],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "b e e_bin" / "train" / "meta.bin").is_file()


def test_a_terminal_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "数据.jsonl"
    path.write_text(lines(raw("春", ["甲", "乙"]), {}), encoding="utf-8")
    for arguments in (["--help"], ["--input", path, "--output", tmp_path / "出"]):
        done = subprocess.run(
            [sys.executable, ROOT / SCRIPT, *arguments],
            capture_output=True, env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        )  # fmt: skip
        assert b"Traceback" not in done.stderr
        assert done.returncode == (0 if "--help" in arguments else 2)
