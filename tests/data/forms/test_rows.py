"""Files of each kind are read row by row: dialects, encodings, bad lines, large files."""

from __future__ import annotations

import csv
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from cpm_bee.data.forms.rows import data_files, read_rows
from cpm_bee.data.forms.tables import Row
from cpm_bee.errors import InputError

TABLE = [["question", "answer"], ["1，什么是\n“海”？", 'a "quoted", cell'], ["天<b>", ""]]
ROWS = [dict(zip(TABLE[0], cells, strict=True)) for cells in TABLE[1:]]


def values(path: Path, **flags: Any) -> list[Any]:
    rows = list(read_rows(path, **flags))
    assert [row.reason for row in rows] == [None] * len(rows)
    return [row.value for row in rows]


def csv_text(rows: list[list[str]], **dialect: Any) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, **dialect).writerows(rows)
    return text.getvalue()


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("lineterminator", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_dialects(tmp_path: Path, delimiter: str, lineterminator: str, encoding: str) -> None:
    text = csv_text(TABLE, delimiter=delimiter, lineterminator=lineterminator)
    (tmp_path / "t.csv").write_bytes(text.encode(encoding))
    found = list(read_rows(tmp_path / "t.csv"))
    assert [row.value for row in found] == ROWS
    # The first cell has a line of its own: places are those of the lines on which rows begin.
    assert [row.where.rpartition(":")[2] for row in found] == ["2", "4"]


@pytest.mark.parametrize("encoding", ["gbk", "gb18030", "utf-16", "big5"])
def test_other_encodings(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes("text,label\r\n很好吃,正\r\n不好吃,反\r\n".encode(encoding))
    expected = [{"text": "很好吃", "label": "正"}, {"text": "不好吃", "label": "反"}]
    assert values(path, encoding=encoding) == expected
    with pytest.raises(InputError) as caught:
        list(read_rows(path))
    assert f"{path}:" in str(caught.value) and "not UTF-8 text" in str(caught.value)
    if encoding != "big5":  # whose bytes are valid GB18030 too
        name = "utf-16" if encoding == "utf-16" else "gb18030"
        assert f"it looks like {name.upper()}: --encoding {name}" in str(caught.value)
    with pytest.raises(InputError, match="not ascii text"):
        list(read_rows(path, encoding="ascii"))


def test_json_in_another_encoding(tmp_path: Path) -> None:
    row = {"input": "很好吃的面条", "<ans>": "正"}
    for name, text in (("l.jsonl", json.dumps(row, ensure_ascii=False) + "\n"),
                       ("a.json", json.dumps([row], ensure_ascii=False))):  # fmt: skip
        (tmp_path / name).write_bytes(text.encode("gbk"))
        assert values(tmp_path / name, encoding="gbk") == [row]
        with pytest.raises(InputError, match=r"--encoding gb18030|give another --encoding"):
            list(read_rows(tmp_path / name))


def reasons(path: Path) -> dict[str, str | None]:
    return {row.where.rpartition(":")[2]: row.reason for row in read_rows(path)}


def test_bad_rows_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('a,b\n1,2\n1,2,3\n1\n"x"y,2\n\n5,6\n"open,7\n8,9\n')
    assert reasons(tmp_path / "t.csv") == {
        "2": None,
        "3": "has 3 cells, there are 2 columns",
        "4": "has 1 cells, there are 2 columns",
        "5": "not valid CSV (',' expected after '\"')",
        "7": None,
        "8": "not valid CSV (a quotation mark opens here and is never closed)",
    }


def test_a_quotation_mark_in_tsv_is_text(tmp_path: Path) -> None:
    """As in CLUE's and GLUE's files; one that surrounds a cell is not, as Excel writes it."""
    (tmp_path / "t.tsv").write_text('a\tb\n"他说\t1\n"x ""y"""\t2\n3\n', "utf-8")
    rows = list(read_rows(tmp_path / "t.tsv"))
    assert [row.value for row in rows] == [{"a": '"他说', "b": "1"}, {"a": 'x "y"', "b": "2"}, None]
    assert rows[2] == Row(f"{tmp_path}/t.tsv:4", None, "has 1 cells, there are 2 columns")


def test_headers(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("好,1\n坏,0\n", "utf-8")
    assert values(tmp_path / "t.csv", no_header=True) == [
        {"1": "好", "2": "1"},
        {"1": "坏", "2": "0"},
    ]
    (tmp_path / "t.csv").write_text(",text,text\n1,a,b\n", "utf-8")
    with pytest.raises(InputError, match="two columns named 'text'"):
        list(read_rows(tmp_path / "t.csv"))
    (tmp_path / "t.csv").write_text(",text\n1,a\n", "utf-8")  # pandas writes its index so
    assert values(tmp_path / "t.csv") == [{"text": "a"}]


def test_excel(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for cells in (["text", "label", None], ["很好吃 <b>", 1], [None, None], ["差", 0.5]):
        book.active.append(cells)
    book.save(tmp_path / "t.xlsx")
    rows = list(read_rows(tmp_path / "t.xlsx"))
    assert [row.value for row in rows] == [
        {"text": "很好吃 <b>", "label": 1},
        {"text": "差", "label": 0.5},
    ]
    assert [row.where for row in rows] == [f"{tmp_path}/t.xlsx:2", f"{tmp_path}/t.xlsx:4"]
    (tmp_path / "no.xlsx").write_text("text,label")
    with pytest.raises(InputError, match="not an Excel file"):
        list(read_rows(tmp_path / "no.xlsx"))


def workbook(path: Path, **sheets: list[list[Any]]) -> Path:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for cells in rows:
            sheet.append(cells)
    book.save(path)
    return path


def test_all_sheets(tmp_path: Path) -> None:
    """Those that are not empty, whatever the order of their columns."""
    first, third = [["text", "label"], ["好", 1], ["差", 0]], [["label", "text"], [1, "美"]]
    path = workbook(tmp_path / "t.xlsx", A=first, empty=[], 三月=third)
    rows = list(read_rows(path))
    assert [row.value for row in rows] == [
        {"text": "好", "label": 1},
        {"text": "差", "label": 0},
        {"text": "美", "label": 1},
    ]
    assert [row.where for row in rows] == [f"{path}[A]:2", f"{path}[A]:3", f"{path}[三月]:2"]
    assert values(path, sheet="三月") == [{"text": "美", "label": 1}]
    assert len(values(path, no_header=True)) == 5
    assert values(path, sheet="empty") == []
    with pytest.raises(InputError, match=r"no sheet 'B' .*; there are: 'A', 'empty', '三月'"):
        list(read_rows(path, sheet="B"))


def test_sheets_with_different_columns(tmp_path: Path) -> None:
    data = [["text", "label"], ["好", 1]]
    path = workbook(tmp_path / "t.xlsx", data=data, notes=[["made by"], ["me"], ["a", "b"]])
    with pytest.raises(InputError) as caught:
        list(read_rows(path))
    head, *listed = str(caught.value).splitlines()
    assert "different columns" in head and "--sheet NAME" in head
    assert listed == ["  'data': text, label", "  'notes': made by"]
    assert values(path, sheet="data") == [{"text": "好", "label": 1}]
    [_, bad] = list(read_rows(path, sheet="notes"))
    assert bad == Row(f"{path}[notes]:3", None, "has 2 cells, there are 1 columns")
    with pytest.raises(InputError, match="1 without names"):
        list(read_rows(path, no_header=True))
    twice = workbook(tmp_path / "twice.xlsx", a=data, b=[["x", "x"]])
    with pytest.raises(InputError, match=r"twice.xlsx\[b\]: there are two columns named 'x'"):
        list(read_rows(twice))


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"messages": [{"role": "user", "content": f"天{i}"}], "n": i} for i in range(600)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    found = list(read_rows(tmp_path / "t.parquet"))
    assert [row.value for row in found] == rows
    assert found[599].where == f"{tmp_path}/t.parquet:600"
    (tmp_path / "no.parquet").write_bytes(b"PAR1 not PAR1")
    with pytest.raises(InputError, match="not a Parquet file that can be read"):
        list(read_rows(tmp_path / "no.parquet"))


@pytest.mark.parametrize("package", ["openpyxl", "pyarrow"])
def test_a_missing_package_is_one_line_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    path = tmp_path / {"openpyxl": "t.xlsx", "pyarrow": "t.parquet"}[package]
    path.write_bytes(b"")
    with pytest.raises(InputError) as caught:
        list(read_rows(path))
    extra = f"{path}: needs the package {package}: pip install -e '.[data]' -c constraints.txt"
    assert str(caught.value) == extra


JSON = [{"a": "天\n[", "n": [1, {"b": "}"}]}, {"a": ""}]


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("name", ["t.json", "t.jsonl", "t.txt"])
def test_json_arrays(tmp_path: Path, indent: int | None, name: str) -> None:
    path = tmp_path / name
    path.write_text("\ufeff" + json.dumps(JSON, ensure_ascii=False, indent=indent), "utf-8")
    assert values(path) == JSON
    path.write_text("\n".join(json.dumps(row, indent=2) for row in JSON), "utf-8")
    assert values(path) == JSON
    path.write_text(json.dumps({"version": 1, "data": JSON}, indent=2), "utf-8")
    assert values(path) == JSON
    path.write_text("\n\n".join(map(json.dumps, JSON)) + "\n", "utf-8")
    assert values(path) == JSON


def test_json_lines_that_are_arrays(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('[["a"], [], "1"]\n[["b"], [], "2"]\n')
    assert values(tmp_path / "t.jsonl") == [[["a"], [], "1"], [["b"], [], "2"]]


def test_bad_json(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text('[\n {"a": 1},\n {"a": 2, "a": 3},\n {"b": 1}\n]')
    assert reasons(path) == {
        "2": None,
        "3": 'the key "a" appears twice; only one of its values can be kept',
        "4": None,
    }
    for text, line in (
        ('[\n {"a": 1},\n {"a": oops}\n]', 3),
        ('[\n {"a": 1}\n', 3),
        ("[\n1 2}", 2),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=f"t.json:{line}: not valid JSON"):
            list(read_rows(path))
    (tmp_path / "t.jsonl").write_text('{"a": 1}\n{"a"}\n\n{"a": "\\u0000"}\n')
    assert list(reasons(tmp_path / "t.jsonl").values())[1].startswith("not valid JSON (")  # type: ignore[union-attr]


# Characters that csv, and then a text file, keeps as they are in a cell.
cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), max_size=12)


@given(st.lists(st.lists(cells, min_size=2, max_size=2), min_size=1, max_size=5))
@examples(25)
def test_any_text_goes_through_csv(tmp_path_factory: pytest.TempPathFactory, rows: Any) -> None:
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    path.write_text(csv_text([["a", "b"], *rows]), "utf-8", newline="")
    assert values(path) == [dict(zip("ab", row, strict=True)) for row in rows]


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.lists(st.dictionaries(st.text(max_size=3), trees, min_size=1), max_size=4), st.booleans())
@examples(25)
def test_any_array_is_read_element_by_element(
    tmp_path_factory: pytest.TempPathFactory, rows: Any, is_indented: bool
) -> None:
    path = tmp_path_factory.mktemp("json") / "t.json"
    path.write_text(json.dumps(rows, indent=1 if is_indented else None), "utf-8")
    assert values(path) == rows


@pytest.mark.parametrize("form", ["lines", "array", "one line", "csv"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, form: str) -> None:
    """Twenty times the rows take no more memory."""
    path = tmp_path / ("t.csv" if form == "csv" else "t.json")

    def peak(count: int) -> int:
        row = {"text": "天" * 200, "label": "x"}
        if form == "csv":
            path.write_text("text,label\n" + f"{row['text']},x\n" * count, "utf-8")
        else:
            separator = {"lines": "\n", "array": ",\n", "one line": ", "}[form]
            body = separator.join([json.dumps(row)] * count)
            path.write_text(body if form == "lines" else f"[{body}]", "utf-8")
        tracemalloc.start()
        assert sum(1 for _ in read_rows(path)) == count
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    few = peak(2_000)
    assert path.stat().st_size > 1e6
    assert peak(10_000) < 1.3 * few + 1e6


def test_which_files_of_a_folder_are_data(tmp_path: Path) -> None:
    for name in ("b.csv", "a.jsonl", "dataset_info.json", ".hidden.csv", "notes.md"):
        (tmp_path / name).write_text("")
    assert [path.name for path in data_files(tmp_path)] == ["a.jsonl", "b.csv"]
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(InputError, match=r"a\.(csv|jsonl) and a\.(csv|jsonl) would have the same"):
        data_files(tmp_path)
    with pytest.raises(InputError, match="the old Excel format"):
        (tmp_path / "x.xls").write_text("")
        data_files(tmp_path / "x.xls")
