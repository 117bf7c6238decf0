"""`subprocess.run` and `Popen` for tests, where `python SCRIPT ...` need not import torch again.

To import torch and this library takes a process about two seconds, and most tests of the entry
scripts nothing else that long. Here such a process is forked from a server (`fork_server.py`) that
has imported both. It is like any other child of this process: with a process id, signals, an exit
status, a working directory, an environment, standard streams, a session and a command line of its
own.

What must not be so is started by `subprocess`, as is all that a fork cannot imitate: commands other
than this Python, flags of the interpreter, `preexec_fn`, limits that were changed, and variables
that are read when a process starts or imports torch (`_READ_AT_START`), unless they have the same
values again and again. CPM_BEE_TEST_FORK=0 has all processes started so.

Hazard: whether a process imports torch, or what is missing for it, is tested with `subprocess`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import inspect
import json
import os
import resource
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_SERVER = Path(__file__).with_name("fork_server.py")
_READ_AT_START = (
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "ATEN_", "ONEDNN_", "DNNL_", "LD_", "MALLOC_"),
    *("PYTHON", "LANG", "LC_", "TORCH_LOGS", "TORCH_CPP_", "TORCHINDUCTOR_", "TORCHDYNAMO_"),
)
_PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
_OURS = [str(_SERVER.parents[1] / name) for name in ("src", "tests", "benchmarks")]
_SEEN_TO = ("PYTHONIOENCODING", "PYTHONPATH", "PYTHONUNBUFFERED")  # by the children
_MOST_SERVERS = 3  # each takes the memory of an imported torch
_MOST_TEXT = 20_000  # of a command
_PR_SET_CHILD_SUBREAPER = 36
_LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]

Key = tuple[Any, ...]


class _Server:
    """A process that forks.

    Raises:
        RuntimeError: it has more than one thread, or did not start.
    """

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self._socket = connection
        self._pid = pid

    @staticmethod
    def start(environment: dict[str, str]) -> _Server:
        own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            room = "-" * _MOST_TEXT  # of which the command lines of the children are made
            process = subprocess.Popen(
                [sys.executable, str(_SERVER), str(other.fileno()), room],
                env={n: v for n, v in environment.items() if n not in _SEEN_TO},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
            )
        process.returncode = 0  # waited for by us
        server = _Server(own, process.pid)
        if own.recv(100) != b"ready":
            server.close()
            raise RuntimeError(f"{_SERVER} cannot fork")
        return server

    def fork(self, request: dict[str, Any], streams: Sequence[int]) -> int:
        """Have it fork; returns the process id of what is now a child of this process.

        Raises:
            RuntimeError: the server has died.
        """
        # Orphans in the tree of a subreaper become its children.
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        try:
            message = json.dumps(request).encode()
            socket.send_fds(self._socket, [message], streams)
            answer = self._socket.recv(100)
        except OSError:
            answer = b""
        finally:
            libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        if not answer:
            raise RuntimeError("the fork server has died")
        return int(answer)

    def close(self) -> None:
        self._socket.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)


class _Servers:
    """The servers of this process, by what their children cannot change."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: Counter[Key] = Counter()
        self._servers: dict[Key, _Server | None] = {}
        self._owner = os.getpid()
        atexit.register(self.close)

    def fork(self, environment: dict[str, str], request: dict[str, Any], fds: list[int]) -> int:
        """Fork; returns the process id, or 0 if there is no server for this environment."""
        if self._owner != os.getpid():  # a fork of ours: what it asks for would not be its child
            return 0
        key = _key(environment)
        with self._lock, contextlib.suppress(RuntimeError):
            self._asked[key] += 1
            if key not in self._servers:
                # The first children pay for the server. Variables of one test alone have none.
                once = self._servers and self._asked[key] == 1
                if once or len(self._servers) >= _MOST_SERVERS:
                    return 0
                self._servers[key] = None  # in case it cannot be started
                self._servers[key] = _Server.start(environment)
            server = self._servers[key]
            self._servers[key] = None  # in case it dies
            if server is not None:
                pid = server.fork(request, fds)
                self._servers[key] = server
                return pid
        return 0

    def add(self, environment: dict[str, str], server: _Server) -> None:
        self._servers[_key(environment)] = server

    def close(self) -> None:
        if self._owner == os.getpid():
            for server in self._servers.values():
                if server is not None:
                    server.close()
            self._servers.clear()


_servers = _Servers()


def serve_with(connection: socket.socket, pid: int) -> None:
    """Use a fork of this process as its server."""
    _servers.add(dict(os.environ), _Server(connection, pid))


def _key(environment: dict[str, str]) -> Key:
    """What the children of a server have in common with it."""
    variables = sorted(
        (name, value)
        for name, value in environment.items()
        if name.startswith(_READ_AT_START) and name not in _SEEN_TO
    )
    limits = [resource.getrlimit(limit) for limit in _LIMITS]
    status = Path("/proc/self/status").read_text()
    [umask] = [line for line in status.splitlines() if line.startswith("Umask")]
    return (*variables, *limits, umask, tuple(sorted(os.sched_getaffinity(0))))


def _can_fork(given: dict[str, Any]) -> bool:
    """Whether the arguments of `Popen._execute_child` ask for nothing that needs an exec."""
    command = given["args"]
    return (
        sys.platform == "linux"
        and os.environ.get("CPM_BEE_TEST_FORK") != "0"
        and not isinstance(command, (str, bytes))
        and len(command) > 1
        and os.fspath(command[0]) == sys.executable
        and _is_plain([os.fsdecode(part) for part in command[1:]])
        and sum(len(os.fsencode(part)) + 1 for part in command) < _MOST_TEXT
        and given["executable"] is None
        and given["preexec_fn"] is None
        and not given["pass_fds"]
        and not given["shell"]
        and given["close_fds"]
        and (given["gid"], given["gids"], given["uid"]) == (None, None, None)
        and given["umask"] == -1
        and given.get("process_group", -1) in (None, -1)
    )


def _is_known(path: str) -> bool:
    """Whether a folder of modules is one of ours, or belongs to Python."""
    return path in _OURS or path.startswith((f"{sys.prefix}/lib", f"{sys.base_prefix}/lib"))


def _is_plain(arguments: list[str]) -> bool:
    """Whether arguments of Python have no flag but -u, which torchrun gives."""
    first = arguments[1:2] if arguments[0] == "-u" else arguments[:1]
    return bool(first) and (first[0] in ("-c", "-m") or not first[0].startswith("-"))


class Popen(subprocess.Popen[Any]):
    """`subprocess.Popen`, which forks where it can."""

    def _execute_child(self, *args: Any) -> None:
        original = super()._execute_child  # type: ignore[misc]
        given = inspect.signature(original).bind(*args).arguments
        if not (_can_fork(given) and self._fork(given)):
            original(*args)

    def _fork(self, given: dict[str, Any]) -> bool:
        environment = {
            os.fsdecode(name): os.fsdecode(value)
            for name, value in (os.environ if given["env"] is None else given["env"]).items()
        }
        paths = [p for p in environment.get("PYTHONPATH", "").split(os.pathsep) if p]
        if not all(map(_is_known, paths)):
            return False  # it may hold other modules of the names that the server has imported
        command = [os.fsdecode(part) for part in given["args"]]
        folder = os.getcwd() if given["cwd"] is None else os.fsdecode(given["cwd"])
        script = next(part for part in command[1:] if part != "-u")
        if not os.path.isdir(folder) or not (
            script.startswith("-") or os.path.isfile(os.path.join(folder, script))
        ):
            return False  # subprocess reports it
        request = {
            "command": command,
            "environment": environment,
            "folder": os.path.abspath(folder),
            "paths": paths,
            "new_session": bool(given["start_new_session"]),
        }
        ends = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        streams = [own if end == -1 else end for own, end in enumerate(ends)]
        pid = _servers.fork(environment, request, streams)
        if not pid:
            return False
        self.pid = pid
        self._child_created = True
        self._close_pipe_fds(*(given[name] for name in _PIPES))  # type: ignore[attr-defined]
        return True


def run(
    command: Sequence[Any],
    *,
    input: Any = None,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[Any]:
    """`subprocess.run` with this module's `Popen`."""
    if input is not None:
        options["stdin"] = subprocess.PIPE
    if capture_output:
        options["stdout"] = options["stderr"] = subprocess.PIPE
    with Popen(command, **options) as process:
        try:
            output, errors = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            with contextlib.suppress(Exception):
                process.communicate(timeout=10)
            raise
    done = subprocess.CompletedProcess(command, process.returncode, output, errors)
    if check:
        done.check_returncode()
    return done


def call(function: Callable[..., object], *arguments: Path) -> None:
    """Call a function of a test file in a process of its own, where memory is as after a start.

    Raises:
        AssertionError: it raised something; the message has the traceback.
    """
    file = Path(inspect.getfile(function)).resolve().relative_to(_SERVER.parent)
    module = ".".join(file.with_suffix("").parts)
    code = "import importlib, sys, pathlib; module, name, *given = sys.argv[1:]\n"
    code += "getattr(importlib.import_module(module), name)(*map(pathlib.Path, given))"
    done = run(
        [sys.executable, "-c", code, module, function.__name__, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(_OURS)},
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
