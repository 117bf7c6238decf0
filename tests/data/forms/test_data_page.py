"""docs/data.md: each form is converted as the page shows, and its commands run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from disk_support import run_here
from support import ROOT

from cpm_bee.json_lines import parse_line, read_lines

PAGES = [ROOT / "docs" / "data.md", ROOT / "docs" / "zh" / "data.md"]
BLOCK = r"```\w+\n(.*?)```\n+"
pages = pytest.mark.parametrize("page", PAGES, ids=["english", "chinese"])


def blocks(page: Path, kind: str, count: int) -> list[tuple[list[str], list[str]]]:
    """The words of each marker of a kind, and the `count` blocks after it."""
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(rf"<!-- {kind}: (.*?) -->\n" + BLOCK * count, re.S)
    return [(shlex.split(m[1]), list(m.groups()[1:])) for m in pattern.finditer(text)]


def converted(data: Path, *flags: str) -> tuple[str, list[object]]:
    output = data.parent / "out"
    done = run_here("convert_data", "--input", data, "--output", output, "--overwrite", *flags)
    assert done.status == 0, done
    lines = [parse_line(line)[0] for _, line in read_lines(output / f"{data.stem}.jsonl")]
    return done.output, lines


def values(block: str) -> list[object]:
    return [json.loads(line) for line in block.splitlines()]


@pages
def test_every_form_is_converted_as_shown(page: Path, tmp_path: Path) -> None:
    found = blocks(page, "form", 2)
    assert {words[0] for words, _ in found} == {
        "alpaca", "dialogue", "question-answer", "classification", "choices",
    }  # fmt: skip
    assert len(found) == 7
    for (form, name, *flags), (given, expected) in found:
        (tmp_path / name).write_text(given, "utf-8")
        output, records = converted(tmp_path / name, *flags)
        assert records == values(expected), form
        assert f": {form}, {len(records)} records" in output


@pages
@pytest.mark.parametrize("kind", ["xlsx", "parquet"])
def test_tables_are_the_same_in_other_files(page: Path, tmp_path: Path, kind: str) -> None:
    openpyxl, pyarrow = pytest.importorskip("openpyxl"), pytest.importorskip("pyarrow")
    from pyarrow import csv, parquet

    tables = [entry for entry in blocks(page, "form", 2) if entry[0][1].endswith(".csv")]
    assert len(tables) == 2
    for (_, _, *flags), (given, expected) in tables:
        (tmp_path / "t.csv").write_text(given, "utf-8")
        table = csv.read_csv(tmp_path / "t.csv")
        if kind == "parquet":
            parquet.write_table(table, tmp_path / "t.parquet")
        else:
            book = openpyxl.Workbook()
            for row in [table.column_names, *zip(*table.to_pydict().values(), strict=True)]:
                book.active.append(row)
            book.save(tmp_path / "t.xlsx")
        assert converted(tmp_path / f"t.{kind}", *flags)[1] == values(expected)
    assert pyarrow.__version__


@pages
def test_the_transform_and_the_description(page: Path, tmp_path: Path) -> None:
    (((script, name), (code, given, expected)),) = blocks(page, "transform", 3)
    (tmp_path / script).write_text(code, "utf-8")
    (tmp_path / name).write_text(given, "utf-8")
    function = re.findall(r"^def (\w+)", code, re.M)[0]
    assert f"--transform my_data/{script}:{function}" in page.read_text(encoding="utf-8")
    flags = ["--transform", f"{tmp_path / script}:{function}"]
    assert converted(tmp_path / name, *flags)[1] == values(expected)
    (((info, name), (description, given, expected)),) = blocks(page, "info", 3)
    (tmp_path / info).write_text(description, "utf-8")
    (tmp_path / name).write_text(given, "utf-8")
    assert converted(tmp_path / name)[1] == values(expected)


@pages
def test_the_commands_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, one after the other, beside a folder my_data."""
    text = page.read_text(encoding="utf-8")
    (block,) = [b for b in re.findall(r"```bash\n(.*?)```", text, re.S) if "inspect_data" in b]
    monkeypatch.chdir(tmp_path)
    Path("my_data").mkdir()
    words = ["春天的花", "夏夜的雨", "秋山的叶", "冬日的雪", "大海的浪", "城市的灯"]
    rows = [{"text": f"{a}和{b}{i}", "label": "好"} for i, a in enumerate(words) for b in words]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    Path("my_data", "all.jsonl").write_text("\n".join(lines), "utf-8")
    first, *commands = block.strip().splitlines()
    assert first == "cd src" and len(commands) == 3
    for command in commands:
        python, script, *flags = shlex.split(command)
        flags = [flag.replace("../", "") for flag in flags]
        done = run_here(script.removesuffix(".py"), *flags)
        assert python == "python" and done.status == 0, done
    assert Path("data.html").is_file()
    assert Path("bin_data/my_task/train/meta.bin").is_file()
