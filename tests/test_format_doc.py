"""The worked examples of docs/format.md against the code, and references to its sections."""

from __future__ import annotations

import json
import re
from typing import Any

import format_examples
import pytest
from support import ROOT

PAGE = ROOT / "docs" / "format.md"
TEXT = PAGE.read_text(encoding="utf-8")
SECTIONS = range(1, 12)


def block(kind: str, name: str) -> list[str]:
    """The lines of the table or code block behind a marker, fences left out."""
    marker = f"<!-- {kind}: {name} -->\n"
    assert TEXT.count(marker) == 1, f"{marker} must be in {PAGE} once"
    lines = TEXT.split(marker)[1].splitlines()
    if lines[0].startswith("```"):
        return lines[1 : lines.index("```", 1)]
    assert lines[0].startswith("|"), f"no table and no code block follows {marker}"
    end = next(i for i, line in enumerate(lines) if not line.startswith("|"))
    return lines[:end]


def page_json(name: str) -> Any:
    return json.loads("\n".join(block("input", name)))


def cells(line: str) -> list[str]:
    parts = [part.strip() for part in line.strip("|").split("|")]
    return [p[1:-1] if len(p) > 1 and p[0] == p[-1] == "`" else p for p in parts]


def test_markers_and_examples_are_the_same() -> None:
    found = re.findall(r"^<!-- example: (.*?) -->$", TEXT, flags=re.MULTILINE)
    assert sorted(found) == sorted(format_examples.EXAMPLES)


@pytest.mark.parametrize("name", format_examples.EXAMPLES)
def test_example(name: str) -> None:
    """The page shows what the code computes; cells behind the computed ones are prose."""
    computed = format_examples.EXAMPLES[name](page_json)
    shown = block("example", name)
    if isinstance(computed[0], str):
        assert shown == computed
        return
    header, rule, *rows = [cells(line) for line in shown]
    assert {len(row) for row in (header, rule, *rows)} == {len(header)}
    width = len(computed[0])
    assert width <= len(header)
    assert [row[:width] for row in rows] == computed


def test_each_section_has_an_anchor_and_an_example() -> None:
    parts = re.split(r'^<a id="s(\d+)"></a>\n## \1\. ', TEXT, flags=re.MULTILINE)
    assert [int(n) for n in parts[1::2]] == list(SECTIONS)
    assert all("<!-- example: " in body for body in parts[2::2])


def test_references_from_the_code_exist() -> None:
    found = 0
    for folder in ("src", "scripts", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            text = " ".join(path.read_text(encoding="utf-8").split())
            for reference in re.findall(r"docs/format\.md ((?:§[\d.]+(?:, | and )?)+)", text):
                for number in re.findall(r"§(\d+)", reference):
                    found += 1
                    assert int(number) in SECTIONS, f"{path}: docs/format.md has no §{number}"
    assert found > 20


def test_sections_named_within_the_page_exist() -> None:
    headings = set(re.findall(r"^##+ (\d+(?:\.\d+)?)\.? ", TEXT, flags=re.MULTILINE))
    assert set(re.findall(r"§(\d+(?:\.\d+)?)", TEXT)) <= headings
