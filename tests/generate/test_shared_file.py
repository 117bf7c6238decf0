"""Several processes answer one file: the shares, what is refused, and runs with torchrun."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT

from cpm_bee.data.record_source import located
from cpm_bee.distributed.rank import RankInfo
from cpm_bee.errors import InputError
from cpm_bee.generate import shared_file

TINY = ROOT / "src" / "ckpts" / "cpm-bee-tiny"


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 6))
def test_the_shares_are_all_records_in_order(sizes: list[int], parts: int) -> None:
    records = [{"input": "字" * size, "<ans>": ""} for size in sizes or [1]]
    places = shared_file.cuts([located("f:1", record) for record in records], parts)
    assert places[0] == 0 and places[-1] == len(records) and len(places) == parts + 1
    assert places == sorted(places)
    texts = [len(json.dumps(r, ensure_ascii=False)) for r in records]
    largest = max(sum(texts[a:b]) for a, b in itertools.pairwise(places))
    assert largest <= sum(texts) / parts + max(texts)


def test_pipes_are_refused(tmp_path: Path) -> None:
    for names, part in (
        (("-", "out.jsonl"), "--input -: several processes cannot share standard input"),
        (("in.jsonl", "-"), "--output -: several processes cannot share standard output"),
        (("in.jsonl", "/dev/null"), "--output /dev/null: several processes need a file"),
    ):
        with pytest.raises(InputError, match=re.escape(part)):
            shared_file.check_names(*names)
    shared_file.check_names("in.jsonl", str(tmp_path / "out.jsonl"))


@pytest.mark.parametrize(
    ("left", "size", "processes"),
    [
        ("out[1].jsonl.rank-0-of-3.partial", 2, "3 processes, this is one with 2"),
        ("out[1].jsonl.rank-1-of-2.partial", 1, "2 processes, this is one with 1"),
        ("out[1].jsonl.partial", 2, "1 process, this is one with 2"),
    ],
)
def test_what_another_number_of_processes_left(
    tmp_path: Path, left: str, size: int, processes: str
) -> None:
    output = str(tmp_path / "out[1].jsonl")
    (tmp_path / left).write_text("")
    shared_file.refuse_other_shares(output, size)  # it has no records
    (tmp_path / left).write_text('{"<ans>": "a"}\n')
    with pytest.raises(InputError, match=processes):
        shared_file.refuse_other_shares(output, size)


def test_each_process_finds_what_is_wrong_in_any_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [located(f"f:{i}", {"input": str(i), "<ans>": ""}) for i in range(4)]
    output = str(tmp_path / "out.jsonl")
    partial = tmp_path / "out.jsonl.rank-1-of-2.partial"
    partial.write_text('{"input": "2", "<ans>": "a"}\n')
    monkeypatch.setattr(RankInfo, "of_this_process", lambda: RankInfo(0, 0, 2))
    with pytest.raises(InputError, match="holds 1 records of an interrupted generation"):
        shared_file.check_shares(output, inputs, resume=False)
    shared_file.check_shares(output, inputs, resume=True)
    partial.write_text('{"input": "3", "<ans>": "a"}\n')
    with pytest.raises(InputError, match="is not the record of that number"):
        shared_file.check_shares(output, inputs, resume=True)


# With torchrun, as a user runs it


def command(*flags: object, ranks: int) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    script = str(ROOT / "src" / "text_generation.py")
    return [sys.executable, *(torchrun if ranks > 1 else []), script, *map(str, flags)]


def start(folder: Path, *flags: object, ranks: int) -> subprocess.Popen[str]:
    return forked.Popen(
        command("--load", TINY, "--device", "cpu", *flags, ranks=ranks),
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def run(folder: Path, *flags: object, ranks: int) -> tuple[int, str, str]:
    process = start(folder, *flags, ranks=ranks)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def write_records(path: Path, count: int) -> Path:
    lines = (ROOT / "raw_data" / "eval.jsonl").read_text("utf-8").splitlines()
    raw = [json.loads(lines[i % len(lines)]) for i in range(count)]
    records = [{"input": f"{i} {r['input'][:40]}", "<ans>": "花"} for i, r in enumerate(raw)]
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    path.write_text(text, encoding="utf-8")
    return path


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


@pytest.mark.slow
def test_two_processes_write_what_one_writes_even_if_one_is_killed(tmp_path: Path) -> None:
    source = write_records(tmp_path / "in.jsonl", 300)
    flags = ["--input", source, "--temperature", 1, "--seed", 3, "--max-length", 20]
    flags += ["--max-tokens", 1]
    process = start(tmp_path, *flags, "--output", "two.jsonl", ranks=2)
    shares = [tmp_path / f"two.jsonl.rank-{rank}-of-2.partial" for rank in range(2)]
    deadline = time.monotonic() + 60
    while not all(s.exists() and s.read_bytes().count(b"\n") > 2 for s in shares):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    holder = Path(f"{shares[1]}.lock").read_text()
    os.kill(int(holder.split()[1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.count("error: ") == 1, errors
    assert str(ROOT / "src" / "cpm_bee") not in errors  # as in a traceback of ours
    assert not (tmp_path / "two.jsonl").exists()
    done = [share.read_bytes().count(b"\n") for share in shares]
    assert all(2 < count < 150 for count in done)
    flags[-1] = 100_000  # decides no answer, so it may change
    flags += ["--resume"]
    status, output, errors = run(tmp_path, *flags, "--output", "two.jsonl", ranks=2)
    assert status == 0, errors
    status, one, errors = run(tmp_path, *flags, "--output", "one.jsonl", ranks=1)
    assert status == 0 and one == output and "300 records written" in one, errors
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    assert left_in(tmp_path) == ["in.jsonl", "one.jsonl", "two.jsonl"]
