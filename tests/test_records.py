from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm_bee import json_lines, records
from cpm_bee.errors import InputError
from cpm_bee.json_lines import parse_line, read_lines
from cpm_bee.records import MAX_NESTING, validate
from cpm_bee.tokenizer import escape, unescape

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


# ------------------------------------------------------------------ what its author did not mean


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('{"input": "a", "input": "b", "<ans>": "c"}', '"input"'),
        ('{"input": "a", "<ans>": "b", "<ans>": "c"}', '"<ans>"'),
        ('{"options": {"<option_0>": "a", "<option_0>": "b"}, "<ans>": ""}', '"<option_0>"'),
    ],
)
def test_a_key_that_stands_twice_is_refused(line: str, key: str) -> None:
    assert parse_line(line) == (
        None,
        f"the key {key} appears twice; only one of its values could be kept",
    )


CONTROL = ["<s>", "</s>", "<pad>", "<unk>", "<root>", "<ans>", "<sep>", "</n>", "</_>"]


@pytest.mark.parametrize("token", [*CONTROL, "<s_1>", "<unk_0>", "<ans_3>"])
def test_control_tokens_in_texts_are_refused(token: str) -> None:
    for record in (
        {"input": f"a{token}b", "<ans>": ""},
        {"a": {"b": token}, "<ans>": ""},
        {"input": "", "<ans>": token},
        {"input": "", "<ans>": {token: ""}},
        {"a": {token: "b"}, "<ans>": ""},
    ):
        [problem] = validate(record)
        assert f"{token} is a control token of the model" in problem
        assert "'<<'" in problem and "--escape" in problem
        assert not records._is_valid(record)
    assert validate({"input": f"a<{token}b", "<ans>": ""}) == []


@pytest.mark.parametrize(
    ("record", "missing"),
    [
        ({"options": {"<option_0>": "a", "<option_1>": "b"}, "<ans>": "<option_7>"}, "<option_7>"),
        ({"input": "a", "<ans>": "see <mask_0>"}, "<mask_0>"),
        ({"input": "<mask_0>", "<ans>": {"<mask_1>": "<mask_0><mask_2>"}}, "<mask_2>"),
    ],
)
def test_an_answer_names_only_what_its_record_has(record: dict, missing: str) -> None:
    [problem] = validate(record)
    assert problem.startswith(f"{missing} in the answer does not appear in the rest")
    assert validate({**record, "note": missing}) == []


def test_keys_under_the_answer_are_context() -> None:
    assert validate({"input": "a", "<ans>": {"<mask_0>": "b", "<mask_1>": "<mask_0>"}}) == []


@given(texts)
def test_escaped_texts_are_plain(text: str) -> None:
    record = {"input": text, "deep": {"key<<": text}, "<ans>": text}
    escaped = records.escape_texts(record)
    assert validate(escaped) == []
    assert unescape(escaped["deep"]["key<<"]) == text


def test_escape_keeps_special_tokens_that_are_meant() -> None:
    record = {
        "input": "<b><mask_0></b> vector<int> <mask> a<b 1 << 2 <0>",
        "options": {"<option_0>": "<s>", "<blank_1>": "x"},
        "<ans>": {"<mask_0>": "<option_0> <blank_1> <ans>"},
    }
    assert records.escape_texts(record) == {
        "input": "<<b><mask_0><</b> vector<<int> <mask> a<<b 1 <<<< 2 <<0>",
        "options": {"<option_0>": "<<s>", "<blank_1>": "x"},
        "<ans>": {"<mask_0>": "<option_0> <blank_1> <<ans>"},
    }
    assert records.escape_texts([1]) == [1]


@pytest.mark.parametrize(
    ("encoding", "name"), [("gbk", "GBK"), ("gb18030", "GBK"), ("utf-16", "UTF-16")]
)
def test_another_encoding_is_named_with_the_command_that_converts(
    tmp_path: Path, encoding: str, name: str
) -> None:
    text = '{"input": "春风又绿江南岸", "<ans>": "明月何时照我还"}\n' * 3
    path = tmp_path / "my data.jsonl"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(InputError, match=f"looks like {name}: iconv") as caught:
        list(read_lines(path))
    command = str(caught.value).partition("looks like " + name + ": ")[2].rstrip(")")
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    converted = (tmp_path / "my data.utf8.jsonl").read_text(encoding="utf-8-sig")
    assert converted == text


def test_nul_characters_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"input": "\0"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl:1: holds NUL"):
        list(read_lines(path))


@pytest.mark.parametrize(
    ("indent", "as_array", "form"),
    [(None, True, "a JSON array"), (2, True, "a JSON array"), (2, False, "JSON over several")],
)
def test_other_json_is_one_problem_with_the_command_that_converts(
    tmp_path: Path, indent: int | None, as_array: bool, form: str
) -> None:
    values = [{"input": "春", "<ans>": "天"}, {"input": "[", "<ans>": "'"}]
    path = tmp_path / "my data.jsonl"
    parts = [values] if as_array else values
    path.write_text("\n".join(json.dumps(p, indent=indent, ensure_ascii=False) for p in parts))
    with pytest.raises(InputError, match=form) as caught:
        json_lines.check_is_lines(path)
    command = str(caught.value).partition("\n")[2].replace("python", sys.executable, 1)
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    converted = tmp_path / "my data.lines.jsonl"
    assert [json.loads(line) for _, line in read_lines(converted)] == values
    json_lines.check_is_lines(converted)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("", False), ("a", True), ({"a": ""}, False), ({"a": "", "b": {"c": " "}}, True)],
)
def test_has_answer(answer: records.Tree, expected: bool) -> None:
    assert records.has_answer(answer) is expected
