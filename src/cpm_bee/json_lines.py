"""Reads text files with one JSON value per line.

`parse_line` and `decode_line` return a reason for a bad line instead of raising. Another encoding,
or JSON that is not one object per line, is reported with the command that converts the file.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpm_bee.errors import InputError
from cpm_bee.paths import not_a_file

# The most bytes per line, far more than any model reads at once. Tokens take 24 times as much.
MAX_LINE = 8 << 20


class DuplicateKeyError(ValueError):
    """A JSON object contains a key twice; all but the last value would be lost."""


def unique_items(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise DuplicateKeyError(next(key for key, count in counts.items() if count > 1))
    return found


def parse_line(line: str) -> tuple[Any, str | None]:
    """Parse one line of JSON; returns (value, None), or (None, reason) if it cannot be used."""
    try:
        return json.loads(line, object_pairs_hook=unique_items), None
    except DuplicateKeyError as error:
        key = json.dumps(str(error), ensure_ascii=False)
        return None, f"the key {key} appears twice; only one of its values could be kept"
    except json.JSONDecodeError as error:
        return None, f"not valid JSON ({error.msg} at column {error.colno})"
    except RecursionError:
        return None, "not valid JSON (nested too deeply)"
    except ValueError as error:  # e.g. a number with more digits than Python converts
        return None, f"not valid JSON ({error})"


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, text) for the non-blank lines of a UTF-8 text file.

    A byte order mark at the beginning and carriage returns are dropped.

    Raises:
        InputError: the file does not exist, or a line is not valid text (with file:line).
    """
    path = Path(path)
    if reason := not_a_file(path):
        raise InputError(f"{path}: {reason}")
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            line, reason = decode_line(raw, path, is_first=number == 1)
            if reason:
                raise InputError(f"{path}:{number}: {reason}")
            if line:
                yield number, line


def decode_line(raw: bytes, path: str | Path | None, *, is_first: bool) -> tuple[str, str | None]:
    """Decode a line; returns (text, None), with "" for a blank line, or ("", reason).

    Args:
        path: the file, for the command that converts it; None if the line is not from a file.
        is_first: whether it is the first line, which may begin with a byte order mark.
    """
    if len(raw) > MAX_LINE:
        return "", f"has {len(raw)} bytes; a line may have up to {MAX_LINE}"
    try:
        line = raw.decode("utf-8-sig" if is_first else "utf-8").strip("\r\n")
    except UnicodeDecodeError as error:
        return (
            "",
            f"not UTF-8 text ({error.reason} at byte {error.start}{_other_encoding(raw, path)})",
        )
    if "\0" in line:
        return "", f"holds NUL characters{_other_encoding(raw, path) or ', so it is not text'}"
    return ("" if line.isspace() else line), None


def probable_encoding(raw: bytes) -> str | None:
    """The probable encoding of a text that is not UTF-8; None if there is no telling."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in raw:
        return "UTF-16"
    try:
        raw.decode("gb18030")
    except UnicodeDecodeError:
        return None
    return "GB18030"  # includes GBK and GB2312


def _other_encoding(raw: bytes, path: str | Path | None) -> str:
    """A hint: the probable encoding of a line that is not UTF-8, and the command to convert it."""
    encoding = probable_encoding(raw)
    if encoding is None:
        return ""
    name = {"GB18030": "GBK"}.get(encoding, encoding)
    if path is None:
        return f"; it looks like {name}"
    new = Path(path).with_suffix(".utf8" + Path(path).suffix).name
    command = f"iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > {shlex.quote(new)}"
    return f"; it looks like {name}: {command}"


def check_is_lines(path: Path) -> None:
    """Refuse a file that contains a JSON array, or objects that span several lines.

    Raises:
        InputError: the file does; the message has the command that writes one object per line.
    """
    with open(path, "rb") as file:
        head = next((line for raw in file if (line := raw.strip(b"\xef\xbb\xbf \t\r\n"))), b"")
    if not (head.startswith(b"[") or head == b"{"):
        return
    form = "a JSON array" if head.startswith(b"[") else "JSON over several lines"
    code = (
        "import json, sys; d = json.JSONDecoder(); t = sys.stdin.read().strip()\n"
        "while t:\n v, n = d.raw_decode(t); t = t[n:].lstrip()\n"
        " for r in v if isinstance(v, list) else [v]: print(json.dumps(r, ensure_ascii=False))"
    )
    new = shlex.quote(path.with_suffix(".lines.jsonl").name)
    raise InputError(
        f"{path}: is {form}; one record per line is expected. This command converts it:\n"
        f"python -c {shlex.quote(code)} < {shlex.quote(str(path))} > {new}"
    )
