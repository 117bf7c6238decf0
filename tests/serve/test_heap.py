"""Free memory goes back to the system, after a while of work and when there is none."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support import ROOT

from cpm_bee.serve.heap import IDLE_SECONDS, SECONDS, HeapTrimmer, malloc_trim


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def resident() -> int:
    """The resident bytes of this process."""
    [kilobytes] = re.findall(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


def test_free_memory_between_blocks_in_use_is_given_back() -> None:
    """In the heap of a thread, where the end of the heap is in use so that malloc keeps it all."""
    trim = malloc_trim()
    if trim is None:
        pytest.skip("this C library has no malloc_trim")
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    size, count = 64 << 10, 2000  # 125 MiB; blocks as large are never the system's own
    sizes = []

    def work() -> None:
        blocks = [libc.malloc(size) for _ in range(count)]
        for block in blocks:
            ctypes.memset(block, 1, size)
        kept = blocks[::50]
        for i, block in enumerate(blocks):
            if i % 50:
                libc.free(block)
        sizes.append(resident())
        trim()
        sizes.append(resident())
        for block in kept:
            libc.free(block)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    before, after = sizes
    assert before - after > count * size // 2


def test_large_blocks_are_returned_after_larger_ones_were_freed() -> None:
    """In a process of its own: the threshold is the process's. Without the call, glibc learns."""
    code = """if True:
        import ctypes, re, sys
        from cpm_bee.serve.heap import return_large_blocks
        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.argtypes = [ctypes.c_void_p]
        if sys.argv[1] == "1" and not return_large_blocks():
            sys.exit("no glibc")
        libc.free(libc.malloc(20 << 20))
        blocks = [libc.malloc(4 << 20) for _ in range(20)]
        for block in blocks:
            ctypes.memset(block, 1, 4 << 20)
        for block in blocks[:-1]:  # the last one holds the end of the heap
            libc.free(block)
        print(re.search(r"VmRSS:\\s*(\\d+)", open("/proc/self/status").read())[1])
    """

    def kilobytes(is_called: int) -> int:
        command = [sys.executable, "-c", code, str(is_called)]
        variables = {n: v for n, v in os.environ.items() if not n.startswith(("MALLOC_", "GLIBC_"))}
        variables["PYTHONPATH"] = str(ROOT / "src")
        done = subprocess.run(command, env=variables, capture_output=True, encoding="utf-8")
        if done.stderr.strip() == "no glibc":
            pytest.skip("this C library has no mallopt")
        return int(done.stdout)

    assert kilobytes(0) - kilobytes(1) > 60 << 10


def test_a_busy_server_trims_now_and_then() -> None:
    clock, calls = Clock(), []
    heap = HeapTrimmer(lambda: calls.append(clock()), clock)
    for _ in range(35):
        clock.seconds += SECONDS / 10
        heap.has_worked()
    assert calls == [SECONDS, 2 * SECONDS, 3 * SECONDS]


def test_an_idle_server_trims_once_and_then_sleeps() -> None:
    calls: list[int] = []
    heap = HeapTrimmer(lambda: calls.append(1), Clock())
    assert heap.seconds_to_wait is None
    heap.has_worked()
    assert heap.seconds_to_wait == IDLE_SECONDS
    heap.is_idle()
    assert heap.seconds_to_wait is None and calls == [1]


def test_without_glibc_nothing_is_done() -> None:
    clock = Clock()
    heap = HeapTrimmer(None, clock)
    clock.seconds += 2 * SECONDS
    heap.has_worked()
    assert heap.seconds_to_wait is None
    heap.is_idle()
