"""Work divided over processes, also as preprocess_dataset.py does it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from preprocess_support import write

from cpm_bee.data.preprocess.workers import Workers, available_cores
from cpm_bee.errors import InputError, RunError

SCRIPT = "src/preprocess_dataset.py"


def slowly(state: list[int], task: int) -> tuple[int, int]:
    """Later tasks are done sooner."""
    time.sleep(0.05 if task % 4 == 0 else 0)
    return state[task], os.getpid()


def fail(_: object, task: int) -> int:
    if task == 3:
        raise InputError("three")
    return task


def die(_: object, task: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_come_in_order(count: int) -> None:
    values = [number * number for number in range(20)]
    with Workers(values, count) as workers:
        results = list(workers.map(slowly, range(20)))
        assert [value for value, _ in results] == values
        processes = {pid for _, pid in results}
        assert len(processes) <= count
        assert (os.getpid() in processes) == (count == 1)


@pytest.mark.parametrize("count", [1, 2])
def test_tasks_are_drawn_as_they_can_be_begun(count: int) -> None:
    drawn = []

    def tasks() -> Iterator[int]:
        for task in range(100):
            drawn.append(task)
            yield task

    with Workers(range(100), count) as workers:
        results = workers.map(slowly, tasks())
        for _ in range(10):
            next(results)
        assert 10 <= len(drawn) <= 10 + 2 * count


@pytest.mark.parametrize("count", [1, 2])
def test_an_exception_of_a_task_is_raised(count: int) -> None:
    with Workers(None, count) as workers:
        results = workers.map(fail, range(10))
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(InputError, match="three"):
            next(results)


def test_a_worker_that_dies() -> None:
    with Workers(None, 2) as workers, pytest.raises(RunError, match="a worker process was killed"):
        list(workers.map(die, range(3)))


def test_available_cores() -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


# ------------------------------------------------------------------ of preprocess_dataset.py


def start(root: Path, folder: Path, *arguments: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A run of two workers, while it works, and the workers' ids."""
    write(folder / "bee_data" / "train.jsonl", 100_000)
    command = [sys.executable, str(root / SCRIPT), "--input", "bee_data", "--output_path", "bin"]
    process = subprocess.Popen(
        [*command, "--output_name", "x", "--workers", "2", *arguments],
        cwd=folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while not list(folder.glob("bin/.train.partial/.chunk-*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return process, list(map(int, children))


def wait_for_end(processes: list[int]) -> None:
    deadline = time.monotonic() + 100
    while any(Path(f"/proc/{pid}/cmdline").exists() and is_alive(pid) for pid in processes):
        assert time.monotonic() < deadline, "a worker goes on"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_ctrl_c_leaves_nothing(root: Path, tmp_path: Path) -> None:
    process, workers = start(root, tmp_path)
    assert len(workers) == 2
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    output, errors = process.communicate(timeout=200)
    assert (process.returncode, output, errors) == (130, "", "interrupted\n")
    wait_for_end(workers)
    assert {path.name for path in tmp_path.iterdir()} == {"bee_data"}


def test_workers_end_with_a_killed_run(root: Path, tmp_path: Path) -> None:
    process, workers = start(root, tmp_path)
    assert len(workers) == 2 and all(map(is_alive, workers))
    process.kill()
    process.wait()
    wait_for_end(workers)
    process.communicate()


def test_a_killed_worker_is_reported(root: Path, tmp_path: Path) -> None:
    process, workers = start(root, tmp_path)
    os.kill(workers[0], signal.SIGKILL)
    output, errors = process.communicate(timeout=200)
    assert (process.returncode, output) == (1, "")
    assert errors.startswith("error: a worker process was killed")
    assert "--workers" in errors
    wait_for_end(workers)
    assert {path.name for path in tmp_path.iterdir()} == {"bee_data"}


def test_workers_have_no_torch(root: Path, tmp_path: Path) -> None:
    process, workers = start(root, tmp_path)
    maps = [Path(f"/proc/{pid}/maps").read_text() for pid in [process.pid, *workers]]
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=200)
    assert all("python" in text and "libtorch" not in text for text in maps)
