"""Writes binary datasets record by record, for tests; preprocessing writes them in pieces."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from cpm_bee.data.bin_dataset import BLOCK_SIZE, HEAD, BlockLayout, frame, payload_limit
from cpm_bee.data.bin_meta import write_meta
from cpm_bee.data.record_pickle import encode
from cpm_bee.errors import InputError
from cpm_bee.records import Record


class DatasetWriter:
    """Writes a dataset of one data file; `meta.bin` comes last, on `close`.

    As a context manager it closes on success, and leaves no `meta.bin` after an exception.

    Args:
        folder: made if missing; must not hold the files yet.
        file_name: name of the data file.
        block_size: bytes of a block, the limit of a record's size.
    """

    def __init__(self, folder: str | Path, file_name: str, block_size: int = BLOCK_SIZE) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file_name = file_name
        self._block_size = block_size
        self._layout = BlockLayout(block_size)
        self._file = open(self._folder / file_name, "xb")  # noqa: SIM115  (close() closes it)

    def write(self, record: Record) -> None:
        """Append a record. Raises `InputError` if it is larger than a block."""
        self.write_payload(encode(record))

    def write_payload(self, payload: bytes) -> None:
        """Append an encoded record. Raises `InputError` if it is larger than a block."""
        if len(payload) > payload_limit(self._block_size):
            raise InputError(
                f"a record of {len(payload)} bytes does not fit into a block of "
                f"{self._block_size} bytes (give a larger --block-size)"
            )
        (offset,) = self._layout.append([HEAD + len(payload)])
        if offset != self._file.tell():  # seeking empties the buffer
            self._file.seek(offset)
        self._file.write(frame(payload))

    def close(self) -> None:
        if self._file.closed:
            return
        self._file.truncate(self._layout.size)  # what was not written reads as zeros
        self._file.close()
        write_meta(self._folder, self._layout.info(self._file_name))

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()
