"""Disks with little room, as a tmpfs or a limit of file sizes; entry scripts in this process."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import io
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from support import ROOT

from cpm_bee.cli import run_command

SCRIPTS = {
    "convert_data": ROOT / "src" / "convert_data.py",
    "inspect_data": ROOT / "src" / "inspect_data.py",
    "data_reformat": ROOT / "tutorials" / "basic_task_finetune" / "data_reformat.py",
    "preprocess_dataset": ROOT / "src" / "preprocess_dataset.py",
    "plan": ROOT / "src" / "plan.py",
    "finetune_cpm_bee": ROOT / "src" / "finetune_cpm_bee.py",
    "text_generation": ROOT / "src" / "text_generation.py",
    "evaluate": ROOT / "src" / "evaluate.py",
    "serve": ROOT / "src" / "serve.py",
    "merge_delta": ROOT / "src" / "merge_delta.py",
    "convert_checkpoint": ROOT / "src" / "convert_checkpoint.py",
    "verify": ROOT / "src" / "verify.py",
}
_PAGE = os.sysconf("SC_PAGE_SIZE")
_MNT_DETACH = 2


@contextlib.contextmanager
def tmpfs(folder: Path, size: int = 64 << 20, options: str = "") -> Iterator[Path]:
    """Mount a small file system in memory; skips the test where mounting is not allowed."""
    folder.mkdir(exist_ok=True)
    extra = f",{options}" if options else ""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}{extra}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"NOT RUN: a tmpfs cannot be mounted here ({done.stderr.strip()})")
    try:
        yield folder
    finally:
        # Detached at once, even if a file on it is still mapped.
        ctypes.CDLL(None).umount2(os.fsencode(folder), _MNT_DETACH)


@contextlib.contextmanager
def room_on_disk(folder: Path, room: int) -> Iterator[None]:
    """Leave about `room` bytes free on the file system of a folder."""
    ballast = folder / "ballast"
    with open(ballast, "wb") as file:
        free = os.statvfs(folder).f_bavail * _PAGE
        os.posix_fallocate(file.fileno(), 0, max(1, (free - room) // _PAGE * _PAGE))
    try:
        yield
    finally:
        ballast.unlink()


@contextlib.contextmanager
def room_in_a_file(folder: Path, room: int) -> Iterator[None]:
    """Have the kernel refuse to let any file grow beyond `room` bytes (EFBIG), for this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Done(NamedTuple):
    status: int
    output: str
    errors: str


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS[name])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look it up
    spec.loader.exec_module(module)
    return module


def run_here(name: str, *arguments: object, seconds: int = 60) -> Done:
    """Run an entry script in this process, which saves the seconds that torch takes to load.

    A script that hangs, for example because it opens a pipe, fails after some seconds.
    """
    module = _module(name)

    def hangs(*_: object) -> None:
        raise AssertionError(f"{name} {arguments} hangs")

    output, errors = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    old_arguments, old_handler = sys.argv, signal.signal(signal.SIGALRM, hangs)
    sys.argv = [str(SCRIPTS[name]), *map(str, arguments)]
    signal.alarm(seconds)
    status: object = 0
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            if name == "data_reformat":  # does without the library
                status = module.main()
            else:
                run_command(module.main)
    except SystemExit as end:
        status = end.code
    finally:
        signal.alarm(0)
        sys.argv = old_arguments
        signal.signal(signal.SIGALRM, old_handler)
    texts = []
    for stream in (output, errors):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode("utf-8"))
    assert isinstance(status, int)
    return Done(status, *texts)
