"""tutorials/own_task: its commands run as they stand, from a table to a server that answers.

Training is cut short; what the model would write after the whole of it is not tested here.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from disk_support import run_here
from serve_support import Served, serving
from support import ROOT

from cpm_bee.json_lines import parse_line, read_lines

TUTORIAL = ROOT / "tutorials" / "own_task"
PAGE = TUTORIAL / "README.md"
TASKS = {
    "Classification": "reviews",
    "Extraction": "repairs",
    "Summary": "news",
    "Dialogue": "service",
}
# Added to the page's own flags of fine-tuning.
SHORT = ("--max-steps", "2", "--report", "tables")
STAGES = ["convert_data", "inspect_data", "preprocess_dataset", "finetune", "evaluate", "serve"]
ADDRESS = "http://127.0.0.1:8000"


def section(title: str) -> str:
    text = PAGE.read_text(encoding="utf-8")
    (found,) = re.findall(rf"^## {title}\n(.*?)(?=^## )", text, re.M | re.S)
    return found


def blocks(title: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", section(title), re.M | re.S)


def commands(title: str) -> list[list[str]]:
    """The words of each command of a section, in order."""
    return [shlex.split(line) for block in blocks(title, "bash") for line in block.splitlines()]


@pytest.fixture
def src(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like src/ of a fresh clone, from which the commands are run."""
    folder = tmp_path / "src"
    folder.mkdir()
    for name in ("ckpts", "scripts"):
        (folder / name).symlink_to(ROOT / "src" / name)
    (tmp_path / "tutorials").symlink_to(ROOT / "tutorials")
    monkeypatch.chdir(folder)
    return folder


def run_in_process(name: str, *flags: str) -> str:
    done = run_here(name, *flags, seconds=240)
    assert done.status == 0, done
    return done.output


def finetune(words: list[str]) -> None:
    """Run VARIABLE=VALUE ... bash scripts/finetune_cpm_bee.sh FLAGS for a few steps."""
    start = words.index("bash")
    settings = dict(word.split("=", 1) for word in words[:start])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [*words[start:], *SHORT],
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **settings},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Eval after 2 steps" in done.stdout


@contextmanager
def served(words: list[str], folder: Path) -> Iterator[Served]:
    """The server of the page's command, on a free port."""
    with serving(folder, *words[2:]) as server:
        yield server


def answer_of(words: list[str], server: Served) -> Any:
    """Run the page's curl command on the server; returns the answer that is in its response."""
    done = subprocess.run(
        [word.replace(ADDRESS, server.url) for word in [*words, "--silent", "--show-error"]],
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    response = json.loads(done.stdout)
    assert "error" not in response, response
    if "records" in response:
        return response["records"][0]["<ans>"]
    choice = response["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


@pytest.mark.slow
@pytest.mark.parametrize("title", TASKS)
def test_from_the_table_to_the_server(title: str, src: Path) -> None:
    *prepare, ask = commands(title)
    stages = []
    for words in prepare:
        script = next(w for w in words if w.endswith((".py", ".sh")))
        name = Path(script).stem
        stages.append(name.removesuffix("_cpm_bee"))
        if name == "finetune_cpm_bee":
            finetune(words)
        elif name == "serve":
            assert words is prepare[-1]
        else:
            assert words[0] == "python"
            output = run_in_process(name, *words[2:])
            assert name != "evaluate" or "exact match" in output
    assert stages == STAGES
    records = src.parent / "bee_data" / TASKS[title] / "train.jsonl"
    first = parse_line(next(iter(read_lines(records)))[1])[0]
    with served(prepare[-1], src) as server:
        assert ask[0] == "curl"
        answer = answer_of(ask, server)
        if title == "Classification":
            assert answer in first["options"]
        elif title == "Extraction":
            assert list(answer) == list(first["<ans>"])
        else:
            assert isinstance(answer, str)
        if title == "Dialogue":
            (code,) = blocks(title, "python")
            namespace: dict[str, Any] = {}
            exec(code.replace(ADDRESS, server.url), namespace)  # the page's own example
            assert isinstance(namespace["answer"].choices[0].message.content, str)


@pytest.mark.parametrize("title", TASKS)
def test_the_shown_record_is_made_of_the_data(title: str, src: Path) -> None:
    run_in_process("convert_data", *commands(title)[0][2:])
    name = TASKS[title]
    made = [
        parse_line(line)[0]
        for part in ("train", "eval")
        for _, line in read_lines(src.parent / "bee_data" / name / f"{part}.jsonl")
    ]
    ((marker, record),) = re.findall(
        r"<!-- record: (\w+) -->\n```json\n(.*?)\n```", section(title), re.S
    )
    assert marker == name
    assert json.loads(record) in made
    data = TUTORIAL.glob(f"data/{name}.*")
    text = next(data).read_text(encoding="utf-8")
    for shown in (b for language in ("csv", "json") for b in blocks(title, language)):
        if shown.startswith("{") and '"<ans>"' in shown:
            continue
        values = [json.loads(shown)] if shown[0] in "[{" else shown.splitlines()
        for value in values:
            wanted = json.dumps(value, ensure_ascii=False).strip("[]") if value is not None else ""
            if isinstance(value, str):
                assert value in text.splitlines()
            else:
                assert re.sub(r"\s", "", wanted) in re.sub(r"\s", "", text)


def test_the_shown_function_is_that_of_the_file() -> None:
    assert blocks("Extraction", "python")[0] in (TUTORIAL / "fields.py").read_text("utf-8")


def test_the_data_is_what_the_script_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["make_data.py", "--output", str(tmp_path)])
    runpy.run_path(str(TUTORIAL / "make_data.py"), run_name="__main__")
    committed = sorted((TUTORIAL / "data").iterdir())
    assert [path.name for path in committed] == sorted(path.name for path in tmp_path.iterdir())
    for path in committed:
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()
