"""Tensors of mapped files onto a device in a type: reading, converting and writing overlap.

A mapping is read a page fault at a time, and leaves what was read in this process's memory. So
the bytes are read from the file itself, in the order of the file, into small buffers.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from cpm_bee.checkpoint.mapped_pages import (
    MappedFile,
    drop_pages,
    find,
    mapped_files,
    use_huge_pages,
)
from cpm_bee.errors import InputError
from cpm_bee.progress import progress_bar

# Bytes in a buffer: a converted chunk spans several huge pages, so that two threads seldom make
# the same one.
_CHUNK = 4 << 20
# More threads than this do not read faster.
_MAX_CONVERTING = 4


class _FileRange(NamedTuple):
    """Where in which file a tensor's bytes stand."""

    file: int
    offset: int
    path: str


class _Chunk(NamedTuple):
    source: torch.Tensor
    target: torch.Tensor
    file_range: _FileRange | None


def transfer(
    tensors: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Tensors of the CPU on a device in a type; mapped ones leave no second copy in memory.

    Where both are a tensor's own it is returned as it is: mapped (copy on write), if it was.
    Shows a progress bar from the third second on. Mapped tensors must not have been written to.

    Raises:
        InputError: a file has become shorter than it was when it was mapped.
    """
    results: dict[str, torch.Tensor] = {}
    chunks: list[_Chunk] = []
    with contextlib.ExitStack() as stack:
        files = _Files(stack)
        for name, tensor in tensors.items():
            if device.type == "cpu" and tensor.dtype == dtype:
                results[name] = tensor
                continue
            target = torch.empty(tensor.shape, dtype=dtype, device=device)
            if device.type == "cpu":
                use_huge_pages(target)
            results[name] = target
            chunks.extend(_split(tensor.detach(), target, files))
        if chunks:
            _run(chunks, device)
    return results


class _Files:
    """Opens the files that tensors are mapped from."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._mapped = mapped_files()
        self._opened: dict[str, int | None] = {}

    def locate(self, tensor: torch.Tensor) -> _FileRange | None:
        """Where a contiguous tensor lies; None where that is not known for certain."""
        begin = tensor.data_ptr()
        mapped = find(begin, begin + tensor.numel() * tensor.element_size(), self._mapped)
        if mapped is None or not tensor.is_contiguous():
            return None
        if mapped.path not in self._opened:
            self._opened[mapped.path] = self._open(mapped)
        file = self._opened[mapped.path]
        if file is None:
            return None
        return _FileRange(file, mapped.offset + begin - mapped.begin, mapped.path)

    def _open(self, mapped: MappedFile) -> int | None:
        try:
            file = os.open(mapped.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        self._stack.callback(os.close, file)
        # A file that was replaced by another since is still mapped as it was.
        if os.fstat(file).st_ino != mapped.inode:
            return None
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return file


def _split(source: torch.Tensor, target: torch.Tensor, files: _Files) -> Iterator[_Chunk]:
    if not source.is_contiguous():
        yield _Chunk(source, target, None)
        return
    file_range = files.locate(source)
    size = source.element_size()
    step = _CHUNK // size
    pairs = zip(source.view(-1).split(step), target.view(-1).split(step), strict=True)
    for i, (values, room) in enumerate(pairs):
        yield _Chunk(
            values,
            room,
            file_range and file_range._replace(offset=file_range.offset + i * step * size),
        )


def _run(chunks: list[_Chunk], device: torch.device) -> None:
    # The order of the files; those of no known file_range last.
    chunks.sort(key=lambda chunk: chunk.file_range or _FileRange(1 << 62, 0, ""))
    own = torch.get_num_threads()
    # One reads while the others convert.
    workers = min(own, _MAX_CONVERTING) + 1
    staging = _Staging(pinned=device.type == "cuda")
    total = sum(_num_bytes(chunk.source) for chunk in chunks)
    try:
        with (
            progress_bar(total=total, description="loading", unit="B", delay=2) as bar,
            # Threads of threads would wait for each other.
            ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            for done in pool.map(staging.move, chunks):
                bar.update(done)
    finally:
        torch.set_num_threads(own)  # setting it in a thread changes what new threads begin with


class _Staging:
    """A buffer for each thread."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._own = threading.local()
        self._reading = threading.Lock()

    def move(self, chunk: _Chunk) -> int:
        """Fill a chunk's target; returns the number of bytes read."""
        values = chunk.source
        if chunk.file_range is not None:
            values = self._read(chunk.file_range, values)
        # Onto a GPU in the file's type, which has fewer bytes; the conversion is done there.
        chunk.target.copy_(values.to(chunk.target.device))
        if chunk.file_range is None:
            drop_pages(chunk.source)
        return _num_bytes(chunk.source)

    def _new_buffer(self) -> torch.Tensor:
        if self._pinned:
            return torch.empty(_CHUNK, dtype=torch.uint8, pin_memory=True)
        # Not from malloc, which keeps what a thread has freed for the next one.
        return torch.frombuffer(mmap.mmap(-1, _CHUNK), dtype=torch.uint8)

    def _read(self, file_range: _FileRange, like: torch.Tensor) -> torch.Tensor:
        if not hasattr(self._own, "buffer"):
            self._own.buffer = self._new_buffer()
        buffer = self._own.buffer[: _num_bytes(like)]
        room = memoryview(buffer.numpy())
        filled = 0
        # One at a time: the kernel reads ahead of a reader that goes through the file in order.
        with self._reading:
            while filled < len(room):
                count = os.preadv(file_range.file, [room[filled:]], file_range.offset + filled)
                if count == 0:
                    raise InputError(f"{file_range.path}: has become shorter while it was read")
                filled += count
        return buffer.view(like.dtype)


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
