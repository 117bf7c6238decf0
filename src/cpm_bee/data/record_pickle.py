"""Writes a record as a pickle and reads it without running code (docs/format.md §9)."""

from __future__ import annotations

import contextlib
import io
import pickle
from typing import Any, ClassVar, NoReturn

from cpm_bee import records
from cpm_bee.errors import InputError
from cpm_bee.records import Record

PICKLE_PROTOCOL = 4  # fixed: a record must give the same bytes in every version of Python


def encode(record: Record) -> bytes:
    return pickle.dumps(record, protocol=PICKLE_PROTOCOL)


class _Refusing:
    """Prevents an unpickler from loading anything but built-in values."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise InputError(f"the pickle names {module}.{name}; it could run code and is refused")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise InputError("the pickle refers to an outside object and is refused")


class _Careful(_Refusing, pickle._Unpickler):
    """The unpickler for any pickle.

    Based on the unpickler in Python: the one in C allocates 16 bytes for each memo number up to the
    largest, and ten bytes of pickle can name number 2**32 - 1.

    Refuses tuples and sets, because a few bytes can make one of 2**60 items whose hash never ends,
    and bytearrays, because their memory is allocated before their bytes are read.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)


def _refuse_operation(unpickler: Any) -> NoReturn:
    raise InputError("the pickle has values other than dictionaries and texts and is refused")


_NO_RECORD = [pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3]
_NO_RECORD += [pickle.EMPTY_SET, pickle.FROZENSET, pickle.BYTEARRAY8]
for _operation in _NO_RECORD:
    _Careful.dispatch[_operation[0]] = _refuse_operation


class _Quick(_Refusing, pickle.Unpickler):
    """The unpickler for pickles that `_is_plain`."""


# The operations that make dictionaries of strings, with their sizes in bytes, arguments included.
# None of them allocates memory out of proportion to the payload.
_SHORT_TEXT, _TEXT = pickle.SHORT_BINUNICODE[0], pickle.BINUNICODE[0]
_SIZES = {
    operation[0]: size
    for operation, size in [
        (pickle.PROTO, 2), (pickle.FRAME, 9), (pickle.EMPTY_DICT, 1), (pickle.MARK, 1),
        (pickle.MEMOIZE, 1), (pickle.BINPUT, 2), (pickle.BINGET, 2), (pickle.LONG_BINGET, 5),
        (pickle.SETITEM, 1), (pickle.SETITEMS, 1),
    ]
}  # fmt: skip


def _is_plain(payload: bytes) -> bool:
    """Whether a pickle has only operations that make dictionaries of strings."""
    position = 0
    try:
        while (operation := payload[position]) != pickle.STOP[0]:
            if operation == _SHORT_TEXT:
                position += 2 + payload[position + 1]
            elif operation == _TEXT:
                position += 5 + int.from_bytes(payload[position + 1 : position + 5], "little")
            else:
                position += _SIZES[operation]
    except (KeyError, IndexError):
        return False
    return position == len(payload) - 1


def decode(payload: bytes) -> Record:
    """The record in a payload.

    Raises:
        InputError: the payload is not a valid record, or could run code.
    """
    value = None
    if _is_plain(payload):
        with contextlib.suppress(Exception):  # the careful unpickler reports what is wrong
            value = _Quick(io.BytesIO(payload)).load()
    if value is None:
        value = _decode_carefully(payload)
    _refuse_shared(value)
    problems = records.validate(value)
    if problems:
        raise InputError("; ".join(problems))
    return value


def _decode_carefully(payload: bytes) -> Any:
    stream = io.BytesIO(payload)
    try:
        value = _Careful(stream).load()
    except InputError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise InputError(f"not a readable pickle ({type(error).__name__}: {error})") from None
    if stream.tell() != len(payload):
        raise InputError(f"{len(payload) - stream.tell()} bytes follow the end of the pickle")
    return value


def _refuse_shared(value: Any) -> None:
    # Forty dictionaries, each containing the next one twice, are small but take forever to walk.
    seen: set[int] = set()
    nodes = [value]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            if id(node) in seen:
                raise InputError("a dictionary appears in several places, so this is not a tree")
            seen.add(id(node))
            nodes.extend(node.values())
