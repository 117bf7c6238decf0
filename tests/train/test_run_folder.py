"""A new run takes the place of an earlier one; neither is lost, whatever the moment of a kill."""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import forked
import pytest
from kills import is_killed
from support import ROOT

from cpm_bee.train.run_folder import RunFolder

NAMED = ["-delta-best.pt", "-delta-best.json", "-delta-last.pt", "-state.pt", "-log.jsonl"]
ENDINGS = ["-state-12.pt", *NAMED]


def places_of(folder: Path, keep_runs: int = 2) -> RunFolder:
    return RunFolder(folder, "run", NAMED, keep_runs)


def write_run(places: RunFolder, folder: Path, text: str, *, finished: bool = True) -> None:
    for ending in ENDINGS[:-1]:
        places.to_write(folder / f"run{ending}").write_text(text)
    last = {"event": "end", "reason": text, "step": 1, "finished": finished}
    log = places.to_write(folder / f"run{ENDINGS[-1]}")
    log.write_text(json.dumps({"event": "start"}) + "\n" + json.dumps(last) + "\n")


def whole_run(folder: Path, text: str, keep_runs: int = 2, *, finished: bool = True) -> None:
    """A run from its start, through its first state, to its end."""
    places = places_of(folder, keep_runs)
    places.begin()
    write_run(places, folder, text, finished=finished)
    places.take_place()


def runs(folder: Path) -> dict[str, str]:
    """The text of each run by its place; fails if one has not all of its files, or others."""
    found = {}
    for place in (folder, *(p for p in folder.iterdir() if p.is_dir())):
        files = {p.name: p for p in place.iterdir() if p.is_file()}
        assert set(files) == {f"run{ending}" for ending in ENDINGS}, place
        (text,) = {files[f"run{ending}"].read_text() for ending in ENDINGS[:-1]}
        assert json.loads(files["run-log.jsonl"].read_text().splitlines()[-1])["reason"] == text
        found[place.name.removeprefix(folder.name)] = text
    return found


def test_earlier_runs_rotate(tmp_path: Path) -> None:
    for text in "abcd":
        whole_run(tmp_path, text)
    assert runs(tmp_path) == {"": "d", "run-previous": "c", "run-previous-2": "b"}
    whole_run(tmp_path, "e", 1)
    assert runs(tmp_path) == {"": "e", "run-previous": "d"}


def test_unfinished_runs_push_out_no_finished_one(tmp_path: Path) -> None:
    whole_run(tmp_path, "good", 1)
    for text in "xyz":
        whole_run(tmp_path, text, 1, finished=False)
    assert runs(tmp_path) == {"": "z", "run-previous": "y", "run-previous-2": "good"}
    whole_run(tmp_path, "better", 1)
    assert runs(tmp_path) == {"": "better", "run-previous": "z", "run-previous-2": "good"}
    whole_run(tmp_path, "best", 1)
    assert runs(tmp_path) == {"": "best", "run-previous": "better"}


@pytest.mark.parametrize(
    ("log", "kept"),
    [
        (None, True),
        ("", False),
        ('{"event": "end", "reason": "all 1 epochs are done", "step": 1}\n', True),
        ('{"event": "train", "step": 1}\n', False),
        ('{"event": "end", "reason": "', False),
        ("[]\n", False),
    ],
)
def test_what_counts_as_finished(tmp_path: Path, log: str | None, kept: bool) -> None:
    whole_run(tmp_path, "a")
    if log is None:
        (tmp_path / "run-log.jsonl").unlink()
    else:
        (tmp_path / "run-log.jsonl").write_text(log)
    for text in "xy":
        whole_run(tmp_path, text, 1, finished=False)
    assert (tmp_path / "run-previous-2").exists() == kept


def test_nothing_is_moved_before_the_first_state(tmp_path: Path) -> None:
    whole_run(tmp_path, "a")
    places = places_of(tmp_path)
    places.begin()
    write_run(places, tmp_path, "b")
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {f"run{e}" for e in ENDINGS}
    assert all(p.read_text() == "a" for p in tmp_path.glob("run-delta*"))
    places.discard_unstarted()
    assert runs(tmp_path) == {"": "a"}
    places.begin()
    write_run(places, tmp_path, "c")  # and is killed
    places_of(tmp_path).begin()
    places_of(tmp_path).finish()
    assert runs(tmp_path) == {"": "a"}


@pytest.mark.parametrize("keep_runs", [1, 2])
@pytest.mark.parametrize("first", range(32))
def test_kills_between_any_two_operations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, keep_runs: int
) -> None:
    """A run dies while it takes its place, the next one while it finishes that, at any moment."""
    before = {"": "newer", "run-previous": "older"}
    after = {"": "third", "run-previous": "newer"}
    if keep_runs == 2:
        after["run-previous-2"] = "older"
    for second in range(40):
        folder = tmp_path / str(second)
        folder.mkdir()
        for text in ("older", "newer"):
            whole_run(folder, text)
        if not is_killed(monkeypatch, first, partial(whole_run, folder, "third", keep_runs)):
            assert first > 12 and runs(folder) == after
            return
        killed = is_killed(monkeypatch, second, places_of(folder, keep_runs).finish)
        current = {path.name: path for path in places_of(folder).current()}
        state = current["run-state.pt"].read_text()
        assert state == current["run-state-12.pt"].read_text()
        places_of(folder, keep_runs).finish()
        assert runs(folder) in (before, after), second
        assert state == runs(folder)[""]  # --resume, which looks first, has seen the same run
        if not killed:
            return
    raise AssertionError("40 operations did not suffice")


@pytest.mark.parametrize("count", range(40))
def test_a_run_that_is_half_removed_is_not_taken_for_a_finished_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Its log, which says that it is unfinished, may be the first of its files to go."""
    for text, finished in (("good", True), ("x", False), ("y", False)):
        whole_run(tmp_path, text, 1, finished=finished)
    is_killed(monkeypatch, count, partial(whole_run, tmp_path, "z", 1, finished=False))
    places_of(tmp_path, 1).finish()
    assert runs(tmp_path) in (
        {"": "z", "run-previous": "y", "run-previous-2": "good"},
        {"": "y", "run-previous": "x", "run-previous-2": "good"},
    )


DIE = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from kills import OPERATIONS
from train.test_run_folder import whole_run
done = 0
def dying(original):
    def operation(*args, **options):
        global done
        if done == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        return original(*args, **options)
    return operation
for name in OPERATIONS:
    setattr(os, name, dying(getattr(os, name)))
whole_run(Path(sys.argv[2]), "third")
"""


@pytest.mark.parametrize("count", [2, 5, 9])
def test_a_process_that_is_killed(tmp_path: Path, count: int) -> None:
    for text in ("older", "newer"):
        whole_run(tmp_path, text)
    tests = str(ROOT / "tests")
    paths = os.pathsep.join([tests, str(ROOT / "src")])
    process = forked.run(
        [sys.executable, "-c", DIE, tests, str(tmp_path), str(count)],
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert process.returncode == -signal.SIGKILL
    places_of(tmp_path).finish()
    after = {"": "third", "run-previous": "newer", "run-previous-2": "older"}
    before = {"": "newer", "run-previous": "older"}
    assert runs(tmp_path) == (after if count > 2 else before)


def test_which_files_are_numbered_states(tmp_path: Path) -> None:
    places = places_of(tmp_path)
    names = ["run-state-9.pt", "run-state-10.pt", "run-state-0.pt"]
    others = [
        "run-state-01.pt",
        "run-state-x.pt",
        "run-state-٣.pt",
        "runs-state-1.pt",
        "run-state-1",
    ]
    for name in [*names, *others]:
        (tmp_path / name).touch()
    (tmp_path / "run-state-11.pt").mkdir()
    assert sorted(path.name for path in places.present()) == sorted(names)
    steps = [step for step, _ in places.numbered_states(places.present())]
    assert steps == [10, 9, 0]
    assert places.numbered_state(10) == names[1]
