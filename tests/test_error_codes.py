"""Every error has a code and a Chinese text: found in the source, and looked up in the tables."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import properties
import pytest
from error_sites import COMMANDS, texts
from hypothesis import assume, given
from hypothesis import strategies as st
from sources import SRC, Sources
from text_flow import HOLE

from cpm_bee import error_codes
from cpm_bee.cli import ArgumentParser
from cpm_bee.error_codes import Pattern, Words
from cpm_bee.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
HAN = re.compile(r"[\u4e00-\u9fff]")
# What may stand before a colon: a flag and its value, a name.
_PLACE = re.compile(r"(--[\w-]+ ?)?[\w./:-]*(⟨\d+⟩[\w./:-]*)*")
# Words of a language: several, or a long one.
_WORDS = re.compile(r"[a-z]{2,}[ ,;:.]+[a-z(<'\"{`]|[a-z]{4,}")
# Texts that are put together at run time, of an exception's text or of values.
AT_RUN_TIME = {
    "{name} has values that are not finite",
    "{name} has {n} columns; nf4 needs a multiple of {m} (int8 takes any number)",
    "process {pid} on {host}",
}
THE_SAME_IN_BOTH = "| Epoch: "  # the line of a step, as in the reference: people search for it
# Messages that Python and the system make.
OF_THE_SYSTEM = [
    *map(os.strerror, (1, 2, 5, 6, 13, 17, 20, 21, 27, 28, 30, 36, 40, 98, 99, 122)),
    "embedded null byte",
    "embedded null character",
    "invalid start byte",
    "invalid continuation byte",
    "unexpected end of data",
    "illegal multibyte sequence",
]


def _numbered(text: str) -> str:
    """A text with values in its holes."""
    parts = text.split(HOLE)
    return parts[0] + "".join(f"⟨{i}⟩{part}" for i, part in enumerate(parts[1:], start=1))


@pytest.fixture(scope="module")
def all_lines() -> dict[tuple[str, bool], str]:
    """Each line for users in the source, and whether it is of an error; and where it is."""
    found: dict[tuple[str, bool], str] = {}
    for place, text, is_error in texts(Sources()):
        for line in text.split("\n"):
            found.setdefault((_numbered(line.strip()), is_error), place)
    return found


@pytest.fixture(scope="module")
def lines(all_lines: dict[tuple[str, bool], str]) -> dict[str, str]:
    """The lines of errors, and where they are."""
    return {line: place for (line, is_error), place in all_lines.items() if is_error}


def _says_something(line: str) -> bool:
    """Whether a line has words of its own: not only places, values and an example of JSON."""
    line = re.sub(r"\{\".*\}", "", line)
    pieces = re.split(r": |:$", line)
    rest = [p for p in pieces[:-1] if not _PLACE.fullmatch(p) and not _is_place(p)]
    return bool(_WORDS.search(re.sub(r"--[\w-]+|⟨\d+⟩", "", " ".join([*rest, pieces[-1]]))))


def _is_place(text: str) -> bool:
    return any(place.match(text) is not None for place in error_codes.places())


def test_every_message_has_chinese_and_every_error_a_code(
    all_lines: dict[tuple[str, bool], str],
) -> None:
    missing: dict[bool, list[str]] = {True: [], False: []}
    proposed: set[str] = set()
    for (line, is_error), place in all_lines.items():
        if not _says_something(line) or line.startswith(THE_SAME_IN_BOTH):
            continue
        if not is_error and COMMANDS.fullmatch(line):
            continue
        pattern = _as_pattern(line)
        if pattern not in proposed and error_codes.read_line(line, lines=not is_error) is None:
            proposed.add(pattern)
            missing[is_error].append(f'  {place}\n    ["{pattern}", "…"],')
    assert len(all_lines) > 1000, "the source is not read"
    assert not missing[True], (
        f"{len(missing[True])} messages are not in src/cpm_bee/messages. Put each, with its "
        "Chinese, under `messages` of the code with the same cause, or of a new code; into "
        "parts.json if it is only a part of a message (a header, a hint):\n"
        + "\n".join(missing[True])
    )
    assert not missing[False], (
        f"{len(missing[False])} lines are not in src/cpm_bee/messages/lines.json (findings: "
        "doctor.json). Put each there, with its Chinese:\n" + "\n".join(missing[False])
    )


def _as_pattern(line: str) -> str:
    line = re.sub(r"^(⟨\d+⟩|--[\w-]+ ⟨\d+⟩|--[\w-]+): ", "", line)
    return json.dumps(re.sub(r"⟨(\d+)⟩", r"{v\1}", line), ensure_ascii=False)[1:-1]


def test_no_message_has_two_codes(lines: dict[str, str]) -> None:
    double = []
    for line in lines:
        begins = [0, *(match.end() for match in re.finditer(": ", line))]
        at = next((b for b in begins if any(error_codes.matches(line[b:]))), None)
        if at is None:
            continue
        found = [pattern for pattern, _ in error_codes.matches(line[at:])]
        codes = {p.code for p in found if p.weight == found[0].weight}
        if len(codes) > 1:
            double.append(f"{line}: {sorted(map(str, codes))}")
    assert not double, "\n".join(double)


def test_chinese_texts_are_chinese_and_have_the_same_values(lines: dict[str, str]) -> None:
    for line in lines:
        if not _says_something(line):
            continue
        chinese = error_codes.translate(line)
        values = re.findall(r"⟨\d+⟩", line)
        assert [v for v in values if v not in chinese] == [], f"{line}\n{chinese}"
        assert HAN.search(chinese) or line.startswith("python -c"), line


def _all_read(text: str) -> Iterator[Pattern]:
    """All patterns that a text and its parts are read with."""
    begins = [0, *(match.end() for match in re.finditer(": ", text))]
    for begin in begins:
        if first := next(error_codes.matches(text[begin:]), None):
            yield first[0]
            for name, value in first[1].items():
                if name.startswith(("reason", "error", "kind")):
                    yield from _all_read(value)
            return
    for match in re.finditer("; ", text):
        left, right = text[: match.start()], text[match.end() :]
        if error_codes.read_line(left) and error_codes.read_line(right):
            yield from _all_read(left)
            yield from _all_read(right)
            return


def _argparse_messages() -> Iterator[str]:
    parser = ArgumentParser(prog="x")
    parser.add_argument("--a", choices=["p", "q"], required=True)
    parser.add_argument("--n", type=float)
    parser.add_argument("--two", nargs=2)
    parser.add_argument("--one", nargs=1)
    parser.add_argument("--more", nargs="+")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--b", action="store_true")
    group.add_argument("--c", action="store_true")
    for line in (
        "", "--a", "--a x", "--a p --n x", "--a p --two 1", "--a p --more", "--a p --b --c",
        "--a p --b=1", "--a p --zzz", "--a p --on 1", "--a p --one",
    ):  # fmt: skip
        with pytest.raises(InputError) as raised:
            parser.parse_args(line.split())
        yield str(raised.value).splitlines()[0]
    yield "invalid choice: 'cud', maybe you meant 'cuda'? (choose from cpu, cuda)"  # Python 3.14
    yield "expected at most one argument"


def _json_messages() -> Iterator[str]:
    for text in ("", "{'a'", '{"a" 1}', "[1 2]", '"a', '"\n"', '"\\x"', "1 2"):
        with pytest.raises(json.JSONDecodeError) as raised:
            json.loads(text)
        yield raised.value.msg


def test_no_entry_is_dead(lines: dict[str, str]) -> None:
    texts = [*lines, *_argparse_messages(), *_json_messages()]
    texts += [text.lower() for text in OF_THE_SYSTEM]
    texts += ["cannot be written: No space left on device"]
    used = {pattern.words.en for text in texts for pattern in _all_read(text)}
    sources = "\n".join(path.read_text(encoding="utf-8") for path in SRC.rglob("*.py"))
    dead = [
        f"{p.code}: {p.words.en}"
        for p in error_codes.patterns()
        if p.words.en not in used | AT_RUN_TIME and not (p.code is None and _occurs(p, sources))
    ]
    assert not dead, "remove from src/cpm_bee/messages:\n" + "\n".join(dead)


def _occurs(pattern: Pattern, sources: str) -> bool:
    """Whether the longest words of a text without a code are in the source."""
    longest = max(re.split(r"\{\w+\}", pattern.words.en), key=len)
    return longest.strip() in sources.replace('"\n            "', "")


@pytest.mark.parametrize("message", [*_argparse_messages(), *map(str.lower, OF_THE_SYSTEM)])
def test_messages_of_python_and_the_system_are_known(message: str) -> None:
    found = error_codes.read_line(message)
    assert found and HAN.search(found.chinese), message


def test_entries_are_complete() -> None:
    entries = error_codes.entries()
    assert 60 <= len(entries) <= 150
    for entry in entries.values():
        assert re.fullmatch(r"E[1-9]\d\d", entry.code)
        for words in (entry.title, entry.cause, entry.fix):
            assert words.en.isascii() or "“" in words.en, entry.code
            assert HAN.search(words.zh), f"{entry.code}: {words}"
        assert entry.cause.en[-1] == entry.fix.en[-1] == ".", entry.code
        assert all(entry.example), entry.code
        assert entry.messages, entry.code
    titles = [entry.title.en for entry in entries.values()]
    assert len(titles) == len(set(titles))
    all_english = [pattern.words.en for pattern in error_codes.patterns()]
    twice = {text for text in all_english if all_english.count(text) > 1}
    assert not twice


@pytest.mark.parametrize("pattern", error_codes.patterns(), ids=lambda p: p.words.en[:40])
def test_both_languages_have_the_same_placeholders(pattern: Pattern) -> None:
    names = [set(re.findall(r"\{([a-z]\w*)\}", text)) for text in pattern.words]
    assert names[0] == names[1], pattern.words


# Anything that a path, a flag or a text of a user may have in it.
HOSTILE = st.text(
    st.sampled_from(list("ab 0.:;/\\'\"(){}[]<>*+?^$|%#=,-_"))
    | st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]),
    min_size=1,
    max_size=12,
).filter(lambda text: text == text.strip() and error_codes.read_line(text) is None)


@pytest.mark.property
@properties.examples(400)
@given(st.data())
def test_any_values_are_kept_and_the_code_is_found(data: st.DataObject) -> None:
    coded = [pattern for pattern in error_codes.patterns() if pattern.code]
    pattern = data.draw(st.sampled_from(coded))
    values = {name: data.draw(HOSTILE) for name in dict.fromkeys(pattern.names)}
    literals = [part for part in re.split(r"\{\w+\}", pattern.words.en) if part]
    # A value with the very words that separate it from the next can be divided in two ways.
    assume(not any(part in value for part in literals for value in values.values()))
    message = pattern.english(values)
    assume(all(message.count(part) == 1 for part in literals))
    codes = error_codes.codes_of(f"some/path: {message}")
    assert codes == [pattern.code]
    chinese = error_codes.translate(f"some/path: {message}")
    assert all(value in chinese for value in values.values())
    assert chinese.startswith("some/path: ") and HAN.search(chinese)


def test_a_message_of_several_lines() -> None:
    message = (
        "this run cannot start:\n"
        "  --dataset x: no such folder; preprocess_dataset.py makes it\n"
        "  --quantize nf4: needs --use-delta: a quantized base cannot be trained in full"
    )
    assert error_codes.codes_of(message) == ["E201", "E106"]
    assert error_codes.with_code(message, "en") == message.replace(
        "start:", "start: (explain: E201, E106)"
    )
    assert error_codes.with_code(message, "zh") == (
        "训练无法开始：（说明：E201、E106）\n"
        "  --dataset x: 没有这个文件夹；由 preprocess_dataset.py 生成\n"
        "  --quantize nf4: 需要 --use-delta：量化的基座不能全参数微调"
    )


def test_a_general_code_is_shown_where_there_is_no_other() -> None:
    assert error_codes.codes_of("this run cannot start:\n  --load x: ???") == ["E501"]


def test_a_text_that_nobody_knows_stays_as_it_is() -> None:
    assert error_codes.codes_of("zzz") == []
    assert error_codes.translate("  zzz yyy\n\nxxx") == "  zzz yyy\n\nxxx"
    assert error_codes.with_code("zzz", "zh") == "zzz"


def test_the_pattern_with_the_most_words_counts() -> None:
    assert error_codes.code_of("x: no space left on device") == "E205"
    assert error_codes.code_of("v: has 3 tokens, the model has 4; give the model's own with "
                               "--vocab FILE (bash scripts/fetch_vocab.sh gets the vocabulary of "
                               "the released models)") == "E409"  # fmt: skip


@pytest.mark.parametrize(
    ("english", "text", "values"),
    [
        ("{a} is {b}", "x is y", {"a": "x", "b": "y"}),
        ("{a} is {b}", "f: x is y", None),  # what stands before a colon is no value
        ("{reason}; more", "a: b; more", {"reason": "a: b"}),  # but of a reason it is
        ("{a} or {a}", "x or x", {"a": "x"}),
        ("{a} or {a}", "x or y", None),
        ("[{a}] (1+1)", "[2] (1+1)", {"a": "2"}),
        ("{a}.", "x", None),
    ],
)
def test_patterns(english: str, text: str, values: dict[str, str] | None) -> None:
    assert Pattern(Words(english, ""), None).match(text) == values
