"""Forks a child for each command that `forked.py` sends, after it has imported torch.

    python tests/fork_server.py SOCKET ROOM

SOCKET is the number of an open socket. Each message is a JSON object (`forked.Popen._fork`), with
the three standard streams; the answer is the process id of the child. ROOM is text that the command
lines of the children overwrite.
"""

from __future__ import annotations

import atexit
import builtins
import codecs
import ctypes
import gc
import importlib
import io
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

# What the entry scripts import late.
_PRELOADED = (
    "cpm_bee.train.setup",
    "cpm_bee.generate.jsonl",
    "cpm_bee.generate.console",
    "cpm_bee.generate.loaded_model",
    "cpm_bee.generate.shared_file",
    "cpm_bee.evaluate.run",
    "cpm_bee.data.preprocess.pipeline",
    "cpm_bee.checkpoint.merge",
    "cpm_bee.checkpoint.convert",
    "torch.distributed.launcher.api",
)


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(connection.fileno(), False)
    sys.path[0] = str(Path(__file__).resolve().parent.parent / "src")
    for name in _PRELOADED:
        importlib.import_module(name)
    sys.path.pop(0)
    tempfile.tempdir = None  # it depends on the environment
    if len(os.listdir("/proc/self/task")) > 1:
        sys.exit("after its imports this process has threads, so it cannot be forked")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()  # so that no collection in a child copies all pages
    connection.send(b"ready")
    _serve(connection, _CommandLine())


class _CommandLine:
    """The memory in which the kernel finds the command line of a process."""

    def __init__(self) -> None:
        # The name, in parentheses, may hold spaces; after it come the fields from the third on.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        self._start, end = int(fields[48 - 3]), int(fields[49 - 3])
        self._size = end - self._start

    def show(self, command: list[str]) -> None:
        text = b"".join(os.fsencode(part) + b"\0" for part in command)
        ctypes.memmove(self._start, text[: self._size - 1].ljust(self._size, b"\0"), self._size)


def _serve(connection: socket.socket, line: _CommandLine) -> None:
    """Fork for each message, until the other end is closed."""
    while True:
        message, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        if not message:
            return
        request = json.loads(message)
        reader, writer = os.pipe()
        barrier, opens = os.pipe()
        first = os.fork()
        if first == 0:
            if os.fork():
                os._exit(0)
            if request["new_session"]:
                os.setsid()
            os.write(writer, str(os.getpid()).encode())
            os.close(opens)
            os.read(barrier, 1)  # until the process that asked is the parent
            for number in (reader, writer, barrier):
                os.close(number)
            connection.close()
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            for stream in streams:
                os.close(stream)
            _become(request, line)
        os.waitpid(first, 0)
        pid = os.read(reader, 20)
        for number in (reader, writer, barrier, opens, *streams):
            os.close(number)
        connection.send(pid)


def _become(request: dict[str, Any], line: _CommandLine) -> NoReturn:
    """Run a command in this process as an interpreter of its own would."""
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    executable, *arguments = sys.orig_argv[:] = request["command"]
    line.show([executable, *arguments])
    sys.path[:0] = request["paths"]
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    if arguments[0] == "-u":
        unbuffered = True
        arguments.pop(0)
    _open_streams(unbuffered)
    torch.seed()  # forks would else draw the same numbers
    np.random.seed()
    _exit(_status_of(lambda: _execute(arguments, line)))


def _status_of(main: Callable[[], None]) -> int:
    """Run the program of this process; returns the exit status that an interpreter gives it."""
    try:
        main()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename in (__file__, runpy.__file__):
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _exit(status: int) -> NoReturn:
    """End as an interpreter does, but without taking all modules apart, which takes long."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError) as error:
            print(f"Exception ignored in: {stream!r}\n{error!r}", file=sys.stderr)
            status = status or 120
    if status == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status & 0xFF)


def _open_streams(unbuffered: bool) -> None:
    given, _, handler = os.environ.get("PYTHONIOENCODING", "").partition(":")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        old = getattr(sys, f"__{name}__")
        encoding = codecs.lookup(given).name if given else old.encoding
        # stderr keeps its handler, whatever the variable says.
        errors = old.errors if number == 2 or not (given or handler) else handler or "strict"
        raw = io.FileIO(number, "rb" if number == 0 else "wb", closefd=False)
        raw.name = f"<{name}>"
        binary: Any = raw
        if number == 0:
            binary = io.BufferedReader(raw)
        elif not unbuffered:
            binary = io.BufferedWriter(raw)
        lines = not unbuffered and (number == 2 or (number == 1 and raw.isatty()))
        stream = io.TextIOWrapper(
            binary, encoding, errors, line_buffering=lines, write_through=unbuffered
        )
        stream.mode = "r" if number == 0 else "w"  # type: ignore[misc]
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _execute(arguments: list[str], line: _CommandLine) -> None:
    kind, *rest = arguments
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    if kind == "-m":
        name, *rest = rest
        sys.argv = ["-m", *rest]
        sys.path.insert(0, os.getcwd())
        if name == "torch.distributed.run":
            _fork_workers(line)
        runpy._run_module_as_main(name)  # type: ignore[attr-defined]
    elif kind == "-c":
        code, *rest = rest
        sys.argv = ["-c", *rest]
        sys.path.insert(0, "")
        exec(compile(code, "<string>", "exec"), module.__dict__)
    else:
        sys.argv = [kind, *rest]
        sys.path.insert(0, os.path.dirname(os.path.realpath(kind)))
        path = os.path.abspath(kind)
        module.__dict__.update(__file__=path, __loader__=SourceFileLoader("__main__", path))
        exec(compile(Path(path).read_bytes(), path, "exec"), module.__dict__)


def _fork_workers(line: _CommandLine) -> None:
    """Have torchrun, which is this process, fork its workers too, from a fork of this process."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    ours, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        ours.close()
        line.show(["fork_server.py"])
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _serve(other, line)
        os._exit(0)
    other.close()
    sys.path.append(str(Path(__file__).parent))
    import forked

    sys.path.pop()
    forked.serve_with(ours, pid)
    subprocess_handler.Popen = forked.Popen  # type: ignore[misc]


if __name__ == "__main__":
    main()
