"""Runs a function in several processes of this machine; results come in order."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from cpm_bee.errors import RunError

Task = TypeVar("Task")
Result = TypeVar("Result")

_AHEAD = 2  # tasks per process that are submitted ahead of the oldest unfinished one

_state: Any = None  # of a worker process


def available_cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Workers:
    """Worker processes with a shared state; a context manager.

    The processes are forked, so that they share the state's memory with this process. They end with
    the context, or if this process is killed. With `count` 1 everything runs in this process.

    Args:
        state: the first argument of every function that they run.
        count: the number of processes.
    """

    def __init__(self, state: Any, count: int) -> None:
        self._local_state = state
        self._count = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self._count > 1:
            gc.freeze()  # garbage collection would write to shared pages and so copy them
            self._pool = ProcessPoolExecutor(
                self._count,
                multiprocessing.get_context("fork"),
                initializer=_begin,
                initargs=(self._local_state,),
            )
            # Forks all processes now, before this process has threads (a progress bar has one).
            self._pool.submit(os.getpid)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            gc.unfreeze()

    def map(
        self, function: Callable[[Any, Task], Result], tasks: Iterable[Task]
    ) -> Iterator[Result]:
        """Yields `function(state, task)` for each task, in order; consumes `tasks` as needed.

        Raises:
            RunError: a process was killed.
        """
        if self._pool is None:
            yield from (function(self._local_state, task) for task in tasks)
            return
        waiting: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                waiting.append(self._pool.submit(_call, function, task))
                if len(waiting) >= _AHEAD * self._count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise RunError(
                "a worker process was killed, perhaps because memory ran out "
                "(fewer --workers need less memory)"
            ) from None


def _begin(state: Any) -> None:
    global _state
    _state = state
    # Ctrl-C reaches every process of the terminal; the main process ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(function: Callable[[Any, Task], Result], task: Task) -> Result:
    return function(_state, task)
