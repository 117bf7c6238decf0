"""The table of docs/memory.md: its figures are what the code predicts today."""

from __future__ import annotations

import json

import pytest

from cpm_bee.train.plan import released

TABLE = json.loads((released.ROOT / released.TABLE).read_text())


def test_the_table_has_all_sizes_and_ways() -> None:
    rows = [(row["size"], row["way"]) for row in TABLE["rows"]]
    assert rows == [(size, way) for size in released.SIZES for way in released.WAYS]
    assert TABLE["records"] == released.RECORDS
    assert TABLE["tokens"] == released.RECORDS * released.LENGTH


@pytest.mark.slow
@pytest.mark.parametrize("row", TABLE["rows"], ids=lambda row: f"{row['size']} {row['way']}")
def test_a_row_is_predicted_again(row: dict[str, object]) -> None:
    assert released.row(str(row["size"]), str(row["way"])) == row, (
        "what is predicted has changed: python -m cpm_bee.train.plan.released"
    )
