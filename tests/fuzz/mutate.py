"""Cheap mutations of valid inputs: bytes, JSON, texts, pickles and zip archives.

All of them take a `random.Random`, so that a seed gives the same inputs again. They know the
structure of what they change: nearly all random bytes are refused at the first look.
"""

from __future__ import annotations

import copy
import io
import json
import pickletools
import random
import struct
import warnings
import zipfile
from typing import Any

# Numbers at which something may overflow or run out.
NUMBERS: list[int] = [0, 1, 2, 3, 7, 8, 63, 64, 127, 128, 255, 256, 1000, 65535, 65536, 10**6]
NUMBERS += [2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64]
NUMBERS += [-n for n in NUMBERS]

TEXTS = [
    "", " ", "\n", "\r", "\t", "\0", "a\0b", "\u3000", "\ufeff", "\u2028", "①", "é", "😀", "春",
    "\ud800", "a\udfffb", "<", ">", "<<", "<a", "<a<b>", "<>", "<_>", "<ans>", "<s>", "</s>",
    "</n>", "</_>", "<unk>", "<mask_0>", "<mask_00>", "<option_3>", "<x_0>", "<" * 99,
    "<mask_" + "9" * 50 + ">", "..", "/", "../a", "/etc/passwd", ".", "a/b", "meta.bin", "%s",
    "{0}", "NaN", "1", "true", "a" * 300, "春" * 5000, "<mask_0>" * 500,
]  # fmt: skip

# What json.dumps does not write; stands in for a value, see `dump_json`.
RAW_JSON = [
    "NaN", "Infinity", "-Infinity", "1e999", "-0", "1E400", "9" * 400, "9" * 5000, "0.1e-999",
    '{"a": 1, "a": 2}', "[" * 1000 + "]" * 1000, "[" * 100_000, '{"a":' * 900 + "1" + "}" * 900,
    '"\\ud800"', '"\\u0000"', "01", "'a'", "nul", "",
]  # fmt: skip


def choose_text(rng: random.Random) -> str:
    if rng.random() < 0.7:
        return rng.choice(TEXTS)
    return "".join(rng.choices(TEXTS[:40], k=rng.randrange(1, 6)))


# ------------------------------------------------------------------ bytes


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to four local changes, most of them near the ends, where formats have their heads."""
    values = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        at = _position(rng, len(values))
        kind = rng.randrange(9)
        if kind == 0 and at < len(values):
            values[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(values):
            values[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif kind == 2:
            values[at:at] = rng.randbytes(rng.choice([1, 2, 8, 100]))
        elif kind == 3:
            del values[at : at + rng.choice([1, 2, 8, 100])]
        elif kind == 4:
            end = at + rng.choice([1, 4, 50, 1000])
            values[at:at] = values[at:end]
        elif kind == 5:
            del values[at:]
        elif kind == 6:
            layout = rng.choice(["<B", "<H", "<I", "<Q"])
            size = struct.calcsize(layout)
            number = rng.choice(NUMBERS) % 256**size
            values[at : at + size] = struct.pack(layout, number)
        elif kind == 7:
            values[at:at] = choose_text(rng).encode("utf-8", "surrogatepass")
        else:
            length = rng.choice([4, 16, 256])
            values[at : at + length] = bytes(length)
    return bytes(values)


def _position(rng: random.Random, size: int) -> int:
    kind = rng.random()
    if kind < 0.4:
        return min(size, int(rng.expovariate(1 / 60)))
    if kind < 0.6:
        return max(0, size - int(rng.expovariate(1 / 60)))
    return rng.randint(0, size)


# ------------------------------------------------------------------ JSON


def mutate_json(rng: random.Random, value: Any) -> bytes:
    """A JSON text of a value with one to three changed nodes."""
    value = copy.deepcopy(value)
    raw: list[str] = []
    for _ in range(rng.randrange(1, 4)):
        value = _mutate_node(rng, value, raw)
    return dump_json(rng, value, raw)


def dump_json(rng: random.Random, value: Any, raw: list[str]) -> bytes:
    """A JSON text; a string "RAW n" becomes the text `raw[n]`. Now and then bytes are changed."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    for number, part in enumerate(raw):
        text = text.replace(f'"RAW {number}"', part)
    data = text.encode("utf-8", "surrogatepass")
    return mutate_bytes(rng, data) if rng.random() < 0.2 else data


def _mutate_node(rng: random.Random, value: Any, raw: list[str]) -> Any:
    """The value with one node changed."""
    nodes = _containers(value)
    if not nodes or rng.random() < 0.03:
        return choose_value(rng, raw)
    node = rng.choice(nodes)
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    if not keys:
        if isinstance(node, dict):
            node[choose_text(rng)] = choose_value(rng, raw)
        else:
            node.append(choose_value(rng, raw))
        return value
    key = rng.choice(keys)
    kind = rng.randrange(6)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[choose_text(rng)] = node.pop(key)
    elif kind == 2:
        node[key] = copy.deepcopy(rng.choice([*nodes, node[rng.choice(keys)]]))
    else:
        node[key] = choose_value(rng, raw)
    return value


def _containers(value: Any) -> list[Any]:
    found: list[Any] = []
    stack = [value]
    while stack and len(found) < 200:
        node = stack.pop()
        if isinstance(node, (dict, list)):
            found.append(node)
            stack.extend(node.values() if isinstance(node, dict) else node)
    return found


def choose_value(rng: random.Random, raw: list[str] | None = None) -> Any:
    """Anything that JSON can hold; with `raw` also what only its text can."""
    kind = rng.randrange(9 if raw is None else 10)
    if kind == 0:
        return rng.choice([None, True, False])
    if kind in (1, 2):
        return rng.choice(NUMBERS)
    if kind == 3:
        return rng.choice([0.5, -1.5, 1e-320, 1e308, float("nan"), float("inf"), 10**400])
    if kind in (4, 5, 6):
        return choose_text(rng)
    if kind == 7:
        return [choose_value(rng) for _ in range(rng.choice([0, 1, 2, 5]))]
    if kind == 8:
        node: Any = {choose_text(rng): choose_text(rng) for _ in range(rng.choice([0, 1, 3]))}
        for _ in range(rng.choice([0, 0, 1, 70])):
            node = {"a": node}
        return node
    assert raw is not None
    raw.append(rng.choice(RAW_JSON))
    return f"RAW {len(raw) - 1}"


# ------------------------------------------------------------------ pickles

_NAMES = [b"os\nsystem\n", b"builtins\neval\n", b"builtins\nbytearray\n", b"torch\nload\n"]
_NAMES += [b"collections\nOrderedDict\n", b"torch._utils\n_rebuild_tensor_v2\n", b"a\nb\n"]
_NAMES += [b"torch\nFloatStorage\n", b"torch\nSize\n", b"torch\nTensor\n", b"torch\nFloatTensor\n"]
_OPERATIONS = [ord(o.code) for o in pickletools.opcodes]


def operation(rng: random.Random) -> bytes:
    """A pickle operation with an argument that may be right or wrong."""
    info = rng.choice(pickletools.opcodes)
    code = info.code.encode("latin-1")
    if info.arg is None:
        return code
    if info.name in ("GLOBAL", "INST"):
        return code + rng.choice(_NAMES)
    size = info.arg.n
    number = rng.choice(NUMBERS)
    if size > 0:
        return code + (number % 256**size).to_bytes(size, "little")
    if size == pickletools.UP_TO_NEWLINE:
        return code + rng.choice([b"1", b"-5", b"9" * 5000, b"a", b"'a'", b"1L", b""]) + b"\n"
    width = {-2: 1, -3: 4, -4: 4, -5: 8}[size]
    content = choose_text(rng).encode("utf-8", "surrogatepass")[: 256**width - 1]
    length = number % 256**width if rng.random() < 0.3 else len(content)
    return code + length.to_bytes(width, "little") + content


def mutate_pickle(rng: random.Random, payload: bytes) -> bytes:
    """Changed bytes, or operations put in, taken out and doubled."""
    if rng.random() < 0.4:
        return mutate_bytes(rng, payload)
    if rng.random() < 0.1:
        return b"\x80\x04" + b"".join(operation(rng) for _ in range(rng.randrange(30))) + b"."
    ends = [position for _, _, position in pickletools.genops(payload) if position is not None]
    parts = [payload[a:b] for a, b in zip(ends, [*ends[1:], len(payload)], strict=True)]
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(parts))
        kind = rng.randrange(5)
        if kind == 0:
            parts.insert(at, operation(rng))
        elif kind == 1:
            parts[at] = operation(rng)
        elif kind == 2 and len(parts) > 1:
            del parts[at]
        elif kind == 3:
            parts.insert(at, parts[rng.randrange(len(parts))])
        elif kind == 4:
            parts[at] = mutate_bytes(rng, parts[at])
        if not parts:
            break
    return b"".join(parts)


# ------------------------------------------------------------------ zip archives


def mutate_zip(rng: random.Random, data: bytes) -> bytes:
    """What `torch.save` wrote with its pickle changed, entries changed, or bytes changed."""
    kind = rng.random()
    if kind < 0.3:
        return mutate_bytes(rng, data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    compression = zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED
    numbers = [i for i, (name, _) in enumerate(entries) if name.endswith("data.pkl")]
    if kind < 0.8:
        name, payload = entries[numbers[0]]
        entries[numbers[0]] = name, mutate_pickle(rng, payload)
    else:
        at = rng.randrange(len(entries))
        name, content = entries[at]
        choice = rng.randrange(4)
        if choice == 0:
            del entries[at]
        elif choice == 1:
            new = choose_text(rng).encode("utf-8", "replace").decode()[:200]
            entries[at] = new.replace("\0", "") or "a", content
        elif choice == 2:
            entries[at] = name, mutate_bytes(rng, content)
        else:
            entries.append((rng.choice(entries)[0] + rng.choice(["", "0"]), content))
    return write_zip(entries, compression)


def write_zip(entries: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", compression) as archive:
        warnings.simplefilter("ignore")  # names that appear twice are meant
        for name, content in entries:
            archive.writestr(name, content)
    return buffer.getvalue()
