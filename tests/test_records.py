from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm_bee import records
from cpm_bee.errors import InputError
from cpm_bee.records import MAX_NESTING, parse_line, read_lines, validate
from cpm_bee.tokenizer import escape

texts = st.text(st.sampled_from("a<>春 \n") | st.characters(exclude_categories=["Cs"])).map(escape)
trees = st.recursive(texts, lambda inner: st.dictionaries(texts, inner, max_size=3), max_leaves=12)


def has_text(tree: object) -> bool:
    return any(map(has_text, tree.values())) if isinstance(tree, dict) else True


@given(st.dictionaries(texts, trees, max_size=4), trees.filter(has_text))
def test_a_tree_of_escaped_texts_with_an_answer_is_a_record(fields: dict, answer: object) -> None:
    assert validate({**fields, "<ans>": answer}) == []


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.sampled_from("a<>春\ud800")),
    lambda inner: (
        st.dictionaries(st.sampled_from(["a", "<ans>", "<a", "\ud800", "<a>"]), inner, max_size=3)
        | st.lists(inner, max_size=2)
    ),
)


@given(anything)
def test_the_quick_check_agrees_with_the_thorough_one(value: object) -> None:
    assert records._is_valid(value) == (records._problems(value) == [])


def test_the_quick_check_of_depth() -> None:
    for depth in (MAX_NESTING - 2, MAX_NESTING - 1, MAX_NESTING, MAX_NESTING + 1):
        value: object = "a"
        for _ in range(depth):
            value = {"a": value}
        record = {"<ans>": "", "b": value}
        assert (
            records._is_valid(record) == (records._problems(record) == []) == (depth < MAX_NESTING)
        )


@pytest.mark.parametrize("answer", [{}, {"a": {}}, {"a": {}, "b": {"c": {}}}])
def test_an_answer_without_any_text_is_none(answer: dict) -> None:
    assert validate({"<ans>": answer}) == ['"<ans>" holds no text']


@given(st.dictionaries(texts, trees, max_size=4))
def test_without_an_answer_it_is_none(fields: dict) -> None:
    fields.pop("<ans>", None)
    [problem] = validate(fields)
    assert '"<ans>"' in problem


@pytest.mark.parametrize(
    ("value", "kind"),
    [([], "a list"), (None, "null"), (3, "a number"), (True, "true or false"), ("a", "str")],
)
def test_what_is_no_object_is_no_record(value: object, kind: str) -> None:
    assert validate(value) == [f"a record is a JSON object, this is {kind}"]


def test_all_problems_of_a_record_are_named_with_their_place() -> None:
    record = {
        "input": "a<b",
        "options": {"<option_0>": 1, "<op<tion>": "x", "deep": {"list": ["a"], "null": None}},
        "half": "\ud800",
    }
    problems = validate(record)
    found = {problem.split(": ")[0] for problem in problems}
    assert found == {
        "value of /input",
        "value of /options/<option_0>",
        "key /options/<op<tion>",
        "value of /options/deep/list",
        "value of /options/deep/null",
        "value of /half",
        'there is no "<ans>" (use "" where the answer is not known)',
    }


def test_depth_is_limited() -> None:
    def nested(depth: int) -> dict:
        node: dict = {"leaf": ""}
        for _ in range(depth - 1):
            node = {"node": node}
        return {**node, "<ans>": ""}

    assert validate(nested(MAX_NESTING)) == []
    [problem] = validate(nested(MAX_NESTING + 1))
    assert "nested more than" in problem


def test_a_key_that_is_no_text() -> None:
    assert validate({1: "a", "<ans>": ""}) == ["key /1: expected text, this is a number"]


def test_parse_line() -> None:
    assert parse_line('{"a": "春"}') == ({"a": "春"}, None)
    value, reason = parse_line('{"a": }')
    assert value is None
    assert reason is not None
    assert "not valid JSON" in reason
    assert "column 7" in reason


@pytest.mark.parametrize("line", ["[" * 200_000, '{"a": ' + "1" * 5000 + "}"])
def test_json_beyond_all_measure_is_a_reason_not_an_exception(line: str) -> None:
    value, reason = parse_line(line)
    assert value is None
    assert reason is not None
    assert "not valid JSON" in reason


def test_read_lines(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b"\xef\xbb\xbf{}\r\n\r\n  \n" + '{"a": "\u2028"}'.encode() + b"\n\n[]")
    assert list(read_lines(path)) == [(1, "{}"), (4, '{"a": "\u2028"}'), (6, "[]")]
    assert json.loads(next(read_lines(path))[1]) == {}


def test_read_lines_names_the_line_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b"{}\n{}\n" + "春".encode("gbk") + b"\n")
    lines = read_lines(path)
    assert [next(lines), next(lines)] == [(1, "{}"), (2, "{}")]
    with pytest.raises(InputError, match=r"records\.jsonl:3: not UTF-8"):
        next(lines)


def test_read_lines_of_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.jsonl: no such file"):
        next(read_lines(tmp_path / "nothing.jsonl"))
