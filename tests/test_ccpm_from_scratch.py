"""scripts/ccpm_from_scratch.sh and what it trains on, with the sample in place of CCPM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from cpm_bee.records import validate

sys.path.insert(0, str(ROOT / "scripts"))
import ccpm_records

SCRIPT = ROOT / "scripts" / "ccpm_from_scratch.sh"


def run(*arguments: object, **settings: object) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {name: str(value) for name, value in settings.items()}
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        env={**os.environ, "PATH": path, "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1", **own},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


def made_records() -> list[dict[str, Any]]:
    texts = ["月落乌啼霜满天", "江枫渔火对愁眠", "姑苏城外寒山寺", "夜半钟声到客船", "春眠不觉晓"]
    return [
        {
            "input": f"第{i}句的意思是{texts[i % 5]}",
            "options": {f"<option_{j}>": texts[(i + j) % 5] for j in range(4)},
            "<ans>": f"<option_{i % 4}>",
        }
        for i in range(20)
    ]


def test_the_task_keeps_its_answers() -> None:
    records = made_records()
    made = list(ccpm_records.Stages(records, seed=1).choices(2))
    assert made == list(ccpm_records.Stages(records, seed=1).choices(2))
    assert made != list(ccpm_records.Stages(records, seed=2).choices(2))
    right = {record["input"]: ccpm_records.right_option(record) for record in records}
    alone = [record for record in made if "input" in record]
    assert len(alone) == 2 * len(records)
    assert {record["<ans>"] for record in alone} == {f"<option_{i}>" for i in range(4)}
    for record in made:
        assert validate(record) == []
        asked = {record["input"]: record["<ans>"]} if "input" in record else record["<ans>"]
        for text, option in asked.items():
            assert record["options"][option] == right[text]
    assert len(made) > len(alone)


def test_the_first_stage_can_be_answered() -> None:
    made = list(ccpm_records.Stages(made_records(), seed=1).words(200))
    for record in made:
        assert validate(record) == []
        answer, options = record["<ans>"], record["options"]
        if isinstance(answer, dict):
            assert all(options[option] == piece for piece, option in answer.items())
        elif answer in options:
            assert options[answer] == record["input"]
        else:
            assert options[record["input"]] == answer
        assert len(set(options.values())) == len(options)
    kinds = {(type(r["<ans>"]).__name__, r.get("input", "")[:1] == "<") for r in made}
    assert kinds == {("dict", False), ("str", False), ("str", True)}


def test_the_vocabulary_has_single_characters() -> None:
    tokens = ccpm_records.vocabulary(made_records())
    assert len(tokens) == len(set(tokens))
    assert {"月", "落", "<option>", "<ans>", "input"} <= set(tokens)
    assert all(len(token) == 1 for token in tokens if token >= "一")


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"MINUTES": 61}, "MINUTES=61: at most 60"),
        ({"CHOICES_STEPS": "many"}, "CHOICES_STEPS=many: must be a whole number from 1"),
    ],
)
def test_wrong_settings(tmp_path: Path, settings: dict[str, object], part: str) -> None:
    done = run(ROOT / "raw_data", WORK=tmp_path / "work", **settings)
    assert done.returncode == 2 and part in done.stderr
    assert not (tmp_path / "work").exists()


def test_the_data_is_missing(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 2 and f"{tmp_path}/train.jsonl: no such file" in done.stderr
    assert run().returncode == 2


@pytest.mark.slow
def test_from_nothing_to_the_table(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for source, target, count in (("train", "train", 60), ("eval", "valid", 8)):
        lines = (ROOT / "raw_data" / f"{source}.jsonl").read_text("utf-8").splitlines(True)[:count]
        (data / f"{target}.jsonl").write_text("".join(lines), encoding="utf-8")
    settings = {"WORK": tmp_path / "work", "WORDS_STEPS": 2, "CHOICES_STEPS": 2}
    done = run(data, **settings, WORDS_RECORDS=200)
    assert done.returncode == 0, done.stderr
    assert "3/4 choices: 2 steps" in done.stdout and "choice accuracy" in done.stdout
    assert "84.96 % and 82.60 %" in done.stdout
    log = tmp_path / "work" / "results" / "choices-log.jsonl"
    events = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    assert events[0]["options"]["load"].endswith("words-last.pt")
    assert events[-1]["step"] == 2 and events[-1]["finished"]
    again = run(data, **settings)  # all is there but the last figure
    assert again.returncode == 0 and "choice accuracy" in again.stdout
    assert log.read_text("utf-8").count('"start"') == 1
