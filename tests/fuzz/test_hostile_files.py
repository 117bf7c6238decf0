"""Files made to run code, to fill the memory or to hang, one of each kind."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import random
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import support
import torch

from cpm_bee import delta
from cpm_bee.checkpoint.reader import Checkpoint
from cpm_bee.checkpoint.sidecar import read_sidecar
from cpm_bee.data import record_pickle
from cpm_bee.data.bin_meta import read_meta
from cpm_bee.data.preprocess.pipeline import preprocess
from cpm_bee.data.record_source import read_records
from cpm_bee.encoding import Encoder
from cpm_bee.errors import InputError
from cpm_bee.json_lines import MAX_LINE, parse_line
from cpm_bee.model.config import ModelConfig
from cpm_bee.pretrained import load_pretrained
from cpm_bee.records import escape_texts, validate
from cpm_bee.tokenizer import Tokenizer
from fuzz import seeds
from fuzz.limits import limits
from fuzz.mutate import mutate_pickle, write_zip

SECONDS = 30


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> seeds.Seeds:
    return seeds.Seeds(tmp_path_factory.mktemp("hostile"))


def refusal(read: Callable[[], object], size: int) -> str:
    """Returns the message of our own error that reading ends with.

    It comes in time and within the memory of `fuzz.limits`.
    """
    with limits(size, SECONDS), pytest.raises(InputError) as caught:
        read()
    return str(caught.value)


# ------------------------------------------------------------------ pickles that run code

CALLS = [("posix", "system"), ("os", "system"), ("nt", "system"), ("subprocess", "getoutput")]
CALLS += [("subprocess", "call"), ("os", "popen"), ("subprocess", "check_output")]
EVALS = [("builtins", "exec"), ("builtins", "eval"), ("__builtin__", "eval"), ("code", "compile")]
EVALS += [("timeit", "timeit"), ("torch.jit", "load"), ("torch", "load"), ("pickle", "loads")]
EVALS += [("numpy.testing._private.utils", "runstring"), ("cProfile", "run")]


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def short(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def malicious(marker: Path) -> list[bytes]:
    """Pickles that make a file where the plain loader reads them, or would on another system."""
    found = []
    for module, name in CALLS + EVALS:
        command = f"touch {marker}" if (module, name) in CALLS else f"open({str(marker)!r}, 'w')"
        call = f"c{module}\n{name}\n".encode()
        stack = short(module) + short(name) + b"\x93"
        argument = text(command)
        ways = [
            call + b"(" + argument + b"tR",
            call + argument + b"\x85R",
            stack + argument + b"\x85R",
            b"(" + argument + f"i{module}\n{name}\n".encode(),
            b"(" + call + argument + b"o",
            call + argument + b"\x85\x81",
            stack + argument + b"\x85}\x92",
            call + argument + b"\x85R}b",
            b"ccollections\nOrderedDict\n)R}" + text("a") + call + argument + b"\x85Rsb",
            b"cbuiltins\ngetattr\n" + call + text("__call__") + b"\x86R" + argument + b"\x85R",
            b"cfunctools\npartial\n" + call + argument + b"\x86R)R",
        ]
        for way in ways:
            found += [
                b"\x80\x02" + way + b".",
                b"\x80\x04}" + text("<ans>") + way + b"s.",
                b"\x80\x02}" + way + text("a") + b"s.",
                b"\x80\x04](" + way + b"e.",
                b"\x80\x02}" + text("a") + text("b") + b"s" + way + b"0.",
            ]
    return found


def as_legacy(payload: bytes) -> bytes:
    """A file of torch before 1.6 with these values."""
    parts = torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {}
    return b"".join(pickle.dumps(part, protocol=2) for part in parts) + payload + payload


def as_zip(payload: bytes) -> bytes:
    return write_zip([("a/data.pkl", payload), ("a/version", b"3\n"), ("a/byteorder", b"little")])


def test_the_pickles_are_malicious(tmp_path: Path) -> None:
    """The plain loader runs them."""
    ran = 0
    for payload in malicious(tmp_path / "marker")[:25]:
        (tmp_path / "marker").unlink(missing_ok=True)
        with contextlib.suppress(Exception):
            pickle.loads(payload)
        ran += (tmp_path / "marker").exists()
    assert ran > 10


def test_no_pickle_runs_code(files: seeds.Seeds, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    payloads = malicious(marker)
    assert len(payloads) > 800
    rng = random.Random(0)
    payloads += [mutate_pickle(rng, rng.choice(payloads)) for _ in range(1000)]
    for number, payload in enumerate(payloads):
        try:
            record_pickle.decode(payload)
        except InputError:
            pass
        else:
            assert b"touch" not in payload or number >= 800
        path = files.path("malicious.bin", as_zip(payload) if number % 2 else as_legacy(payload))
        with pytest.raises(InputError):
            Checkpoint(path)
        with pytest.raises(InputError):
            delta.load(files.model, path, "", "")
        assert not marker.exists(), payload


def test_a_checkpoint_that_runs_code_is_told_so(files: seeds.Seeds, tmp_path: Path) -> None:
    for payload in malicious(tmp_path / "marker")[:3]:
        for content in (as_zip(payload), as_legacy(payload)):
            with pytest.raises(InputError, match="it is not opened, since it could run code"):
                Checkpoint(files.path("malicious.bin", content))


# ------------------------------------------------------------------ little that becomes much


def zip_entries(content: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


@pytest.mark.parametrize("entry", ["data.pkl", "data/0"])
def test_zip_bombs(files: seeds.Seeds, entry: str) -> None:
    entries = [
        (name, bytes(300 << 20) if name.endswith(entry) else content)
        for name, content in zip_entries(files.checkpoint)
    ]
    content = write_zip(entries, zipfile.ZIP_DEFLATED)
    assert len(content) < 1 << 20
    path = files.path("bomb.bin", content)
    message = refusal(lambda: Checkpoint(path), len(content))
    assert "compressed" in message


def test_a_zip_of_many_entries_over_the_same_bytes(files: seeds.Seeds) -> None:
    """The directory of an archive may name the same bytes again and again."""
    path = files.path("overlap.bin", files.checkpoint)
    content = bytearray(files.checkpoint)
    end = content.rfind(b"PK\x05\x06")
    count, directory_size, begin = struct.unpack("<HII", content[end + 10 : end + 20])
    directory = bytes(content[begin : begin + directory_size])
    copies = 50
    tail = struct.pack(
        "<4sHHHHIIH", b"PK\x05\x06", 0, 0, count * copies, count * copies,
        len(directory) * copies, begin, 0,
    )  # fmt: skip
    path.write_bytes(bytes(content[:begin]) + directory * copies + tail)
    with limits(path.stat().st_size, SECONDS):
        try:
            Checkpoint(path)
        except InputError as error:
            assert str(path) in str(error)


def nested_tuples(levels: int) -> bytes:
    """Each tuple is twice the one before: 2**levels items in a few bytes."""
    level = b"h\x00h\x00\x86q\x00"
    return b")q\x00" + level * levels


BOMBS = {
    "bytearray": b"cbuiltins\nbytearray\n" + b"\x8a\x05" + struct.pack("<Q", 10**10)[:5] + b"\x85R",
    "py2 bytearray": b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R",
    "bytearray8": b"\x96" + struct.pack("<Q", 10**10),
    "memo": b"}r\xff\xff\xff\xff",
    "key of tuples": b"}" + nested_tuples(60) + b"Ns",
    "set of tuples": b"\x8f(" + nested_tuples(60) + b"\x90",
    "doubled": b"})" + b"2\x86" * 60 + b"Ns",
    "long text": b"X\xff\xff\xff\xffa",
    "long bytes": b"\x8e" + struct.pack("<Q", 2**62) + b"a",
    "frame": b"\x95" + struct.pack("<Q", 2**62) + b"}",
    "digits": b"}L" + b"9" * 100_000 + b"L\nNs",
    "huge key": b"}\x8b" + struct.pack("<I", 100_000) + b"\x7f" * 100_000 + b"Ns",
    "marks": b"(" * 100_000,
    "deep lists": b"(" * 100_000 + b"l" * 100_000,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_pickles_that_take_all_memory_or_time(files: seeds.Seeds, name: str) -> None:
    for protocol in (b"\x80\x02", b"\x80\x04"):
        payload = protocol + BOMBS[name] + b"."
        message = refusal(lambda payload=payload: record_pickle.decode(payload), len(payload))  # type: ignore[misc]
        assert message
        for content in (as_zip(payload), as_legacy(payload)):
            path = files.path("bomb.bin", content)
            message = refusal(lambda path=path: Checkpoint(path), len(content))  # type: ignore[misc]
            assert str(path) in message


@pytest.mark.parametrize("shape", [(1 << 40,), (1 << 40, 8), (8, 1 << 33), (1 << 20, 1 << 10)])
def test_tensors_that_claim_more_values_than_the_file_has(
    files: seeds.Seeds, shape: tuple[int, ...]
) -> None:
    view = torch.zeros(1).expand(shape)
    tensors: dict[str, Any] = {n: p.detach() for n, p in files.model.named_parameters()}
    vocabulary = str(files.path("vocab.txt", files.vocabulary))
    for name in tensors:
        content = seeds.torch_file({**tensors, name: view})
        path = str(files.path("claims.bin", content))
        message = refusal(
            lambda path=path: load_pretrained(  # type: ignore[misc]
                path, "auto", vocabulary, torch.float32, torch.device("cpu")
            ),
            len(content),
        )  # type: ignore[misc]
        assert "the file holds fewer" in message


def test_many_names_of_one_tensor(files: seeds.Seeds) -> None:
    one = torch.zeros(1 << 20)
    content = seeds.torch_file({f"encoder.layers.{i}.self_att.a": one for i in range(1000)})
    path = files.path("shared.bin", content)
    message = refusal(lambda: Checkpoint(path), len(content))
    assert "the file holds fewer" in message


def test_a_tied_embedding_may_be_one_tensor(files: seeds.Seeds) -> None:
    tensors = {n: p.detach() for n, p in files.model.named_parameters()}
    tensors["lm_head.weight"] = tensors["input_embedding.weight"]
    assert Checkpoint(files.path("tied.bin", seeds.torch_file(tensors))).entries


def test_a_delta_of_a_huge_rank(files: seeds.Seeds) -> None:
    """One real tensor must not make room for the same rank in all layers."""
    rank = 1 << 20
    name = "encoder.layers.0.self_att.self_attention.project_q.lora.lora_A"
    content = seeds.torch_file({name: torch.zeros(rank, 8)})
    path = files.path("rank.pt", content)
    before = {n: p for n, p in files.delta_model.named_parameters() if ".lora." in n}
    message = refusal(lambda: delta.load(files.delta_model, path, "", ""), len(content))
    assert "is missing" in message
    after = {n: p for n, p in files.delta_model.named_parameters() if ".lora." in n}
    assert all(after[name] is p for name, p in before.items())


def test_a_record_of_many_fields(files: seeds.Seeds) -> None:
    record = {"<ans>": "", "a": {str(i): "" for i in range(100_000)}}
    size = len(json.dumps(record))
    message = refusal(lambda: Encoder(files.tokenizer).encode(record), size)
    assert "more than 4096 fields" in message
    record = {"<ans>": "", "a": {str(i): "" for i in range(2000)}}
    with limits(len(json.dumps(record)), SECONDS):
        encoded = Encoder(files.tokenizer).encode(record)
        assert encoded.tree.relations.shape == (4004, 4004)


# ------------------------------------------------------------------ safetensors


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS = {
    "empty file": b"",
    "short": b"\x01\x02",
    "length 2**63": safetensors({}, length=2**63),
    "length 2**64 - 1": safetensors({}, length=2**64 - 1),
    "length of 200 MB": safetensors({}, length=200 << 20),
    "no JSON": safetensors(b"abc"),
    "no UTF-8": safetensors(b'{"\xff": 1}'),
    "list": safetensors([]),
    "deep": safetensors(b"[" * 100_000),
    "deep metadata": safetensors(b'{"__metadata__":' + b'{"a":' * 1000 + b"1" + b"}" * 1001),
    "shape 2**62": safetensors({"a": tensor(0, 4, [2**62])}, bytes(4)),
    "shape overflows": safetensors({"a": tensor(0, 4, [2**32, 2**32])}, bytes(4)),
    "shape 10**30": safetensors({"a": tensor(0, 4, [10**30])}, bytes(4)),
    "negative shape": safetensors({"a": tensor(0, 4, [-1])}, bytes(4)),
    "offset beyond": safetensors({"a": tensor(0, 4000, [1000])}, bytes(4)),
    "offsets turned": safetensors({"a": tensor(4, 0, [1])}, bytes(4)),
    "overlap": safetensors({"a": tensor(0, 4, [1]), "b": tensor(0, 4, [1])}, bytes(4)),
    "hole": safetensors({"a": tensor(4, 8, [1])}, bytes(8)),
    "more data": safetensors({"a": tensor(0, 4, [1])}, bytes(8)),
    "unknown type": safetensors({"a": tensor(0, 4, [1], "X99")}, bytes(4)),
    "other type": safetensors({"a": tensor(0, 8, [1], "I64")}, bytes(8)),
    "complex": safetensors({"a": tensor(0, 8, [1], "C64")}, bytes(8)),
    "no shape": safetensors({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4)),
    "no names": safetensors({}),
    "doubled": safetensors(b'{"a": 1, "a": 2}'),
}


@pytest.mark.parametrize("name", HEADERS)
def test_wild_safetensors_headers(files: seeds.Seeds, name: str) -> None:
    path = files.path("wild.safetensors", HEADERS[name])
    message = refusal(lambda: Checkpoint(path), len(HEADERS[name]))
    assert "wild.safetensors" in message


# ------------------------------------------------------------------ JSON

DEPTHS = [1_000, 100_000]


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("brackets", ["[]", ('{"<ans>":', "}"), ('{"a":', "}")])
def test_deep_json(files: seeds.Seeds, depth: int, brackets: Any) -> None:
    begin, end = brackets
    deep = begin * depth + ('"a"' if begin != "[" else "") + end * depth
    content = deep.encode()
    record = b'{"<ans>": "a", "b": ' + content + b"}"
    jsonl = [files.path(f"{i}.jsonl", c) for i, c in enumerate([content, record])]
    readers: list[Callable[[], object]] = [
        *(lambda path=path: read_records(str(path)) for path in jsonl),  # type: ignore[misc]
        *(
            lambda path=path: preprocess(  # type: ignore[misc]
                path, files.folder / "deep", "data", seed=0, overwrite=True, block_size=1 << 20
            )
            for path in jsonl
        ),
        lambda: ModelConfig.load(files.path("deep.json", content)),
        lambda: Checkpoint(files.path("deep.safetensors.index.json", content)),
        lambda: Checkpoint(
            files.path("deep.safetensors.index.json", b'{"weight_map": ' + content + b"}")
        ),
    ]
    for read in readers:
        message = refusal(read, len(content))
        assert message
    folder = files.folder / "deep-meta"
    folder.mkdir(exist_ok=True)
    (folder / "meta.bin").write_bytes(content + b"\n")
    message = refusal(lambda: read_meta(folder), len(content))
    assert "meta.bin" in message
    files.path("sidecar.json", content)
    message = refusal(lambda: read_sidecar(files.folder / "sidecar.pt"), len(content))
    assert "sidecar.json" in message


@pytest.mark.parametrize("depth", [70, 400, 900])
def test_deep_records_are_escaped_and_refused(depth: int) -> None:
    value, reason = parse_line('{"<ans>":' * depth + '"a<b"' + "}" * depth)
    assert reason is None
    assert any("nested more than 64 deep" in problem for problem in validate(escape_texts(value)))


def test_large_objects_take_no_quadratic_time() -> None:
    keys = ", ".join(f'"<a_{i}>": "<b<a_{i}>"' for i in range(50_000))
    line = f'{{"<ans>": "", {keys}}}'
    with limits(len(line), SECONDS):
        value, reason = parse_line(line)
        assert reason is None
        assert validate(escape_texts(value)) == []
        doubled, reason = parse_line(f'{{"<ans>": "", {keys}, "<a_7>": ""}}')
        assert doubled is None and "appears twice" in str(reason)


def test_messages_stay_short() -> None:
    """A long key above many wrong values once made a message of their product."""
    record = {"k" * 1_000_000: {str(i): 1 for i in range(20_000)}, "<ans>": ""}
    with limits(1_200_000, SECONDS):
        problems = validate(record)
    assert 1 <= len(problems) <= 100
    assert max(map(len, problems)) < 1000


# ------------------------------------------------------------------ long lines, NUL, surrogates


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["record", "open string", "no JSON", "no UTF-8"])
def test_a_line_of_100_megabytes(files: seeds.Seeds, kind: str) -> None:
    size = 100 << 20
    begin, end = {
        "record": (b'{"<ans>": "a", "input": "', b'"}'),
        "open string": (b'{"<ans>": "', b""),
        "no JSON": (b"", b""),
        "no UTF-8": (b"\xff", b""),
    }[kind]
    path = files.path("long.jsonl", begin + b"a" * size + end + b"\n")
    limit = f"a line may have up to {MAX_LINE}"
    message = refusal(lambda: read_records(str(path)), size)
    assert limit in message
    message = refusal(
        lambda: preprocess(
            path,
            files.folder / "long",
            "data",
            seed=0,
            overwrite=True,
            block_size=1 << 20,
            tokenizer=files.tokenizer,
        ),
        size,
    )
    assert limit in message
    script = "tutorials/basic_task_finetune/data_reformat.py"
    done = support.run_script(script, "--input", path, "--output", files.folder / "reformatted")
    assert done.returncode == 2
    assert limit in done.stderr and len(done.stderr) < 1000
    path.unlink()


@pytest.mark.slow
def test_a_line_as_long_as_is_allowed(files: seeds.Seeds) -> None:
    begin, end = b'{"<ans>": "a", "input": "', b'"}'
    line = begin + b"a" * (MAX_LINE - len(begin) - len(end)) + end
    path = files.path("longest.jsonl", line)
    with limits(len(line), 4 * SECONDS):
        [found] = read_records(str(path))
        encoded = Encoder(files.tokenizer).encode(found.record)
    assert len(encoded) > 0
    assert len(str(found.record["input"])) == len(line) - len(begin) - len(end)


CHARACTERS = {
    "NUL": b"a\x00b",
    "escaped NUL": b"a\\u0000b",
    "lone surrogate": b"a\\ud800b",
    "surrogate bytes": b"a\xed\xa0\x80b",
    "surrogates turned": b"\\udc00\\ud800",
}


@pytest.mark.parametrize("name", CHARACTERS)
def test_nul_and_surrogates(files: seeds.Seeds, name: str) -> None:
    part = CHARACTERS[name]
    for line in (b'{"<ans>": "a", "input": "%s"}' % part, b'{"<ans>": "a", "%s": "b"}' % part):
        path = files.path("odd.jsonl", line + b"\n")
        if name == "escaped NUL":
            [found] = read_records(str(path))  # a character like any other
            Encoder(files.tokenizer).encode(found.record)
            continue
        message = refusal(lambda path=path: read_records(str(path)), len(line))  # type: ignore[misc]
        assert "odd.jsonl:1" in message
    config = files.config_file.replace(b"8", b'"%s"' % part, 1)
    message = refusal(lambda: ModelConfig.load(files.path("odd.json", config)), len(config))
    assert message
    meta = (files.dataset / "meta.bin").read_bytes().replace(b'"data"', b'"%s"' % part)
    folder = files.folder / "odd-meta"
    folder.mkdir(exist_ok=True)
    (folder / "meta.bin").write_bytes(meta)
    message = refusal(lambda: read_meta(folder), len(meta))
    assert "meta.bin" in message
    if b"\\" not in part:
        vocabulary = files.vocabulary + b"\n" + part
        if name == "NUL":
            assert len(Tokenizer.load(files.path("odd.txt", vocabulary))) == len(seeds.TOKENS) + 1
        else:
            odd = files.path("odd.txt", vocabulary)
            message = refusal(lambda: Tokenizer.load(odd), len(vocabulary))
            assert "not UTF-8" in message


SCRIPTS = {
    "src/preprocess_dataset.py": ("--output_path", "--output_name", "data", "--vocab", "none"),
    "tutorials/basic_task_finetune/data_reformat.py": ("--output",),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_end_with_a_message(files: seeds.Seeds, script: str) -> None:
    lines = [b'{"<ans>": "a", "input": "%s", "choices": []}' % part for part in CHARACTERS.values()]
    path = files.path("odd.jsonl", b"\n".join([*lines, b"[" * 1000, b"\x00", b'{"\\ud800": 1}']))
    first, *rest = SCRIPTS[script]
    with tempfile.TemporaryDirectory() as output:
        done = support.run_script(script, "--input", path, first, Path(output) / "made", *rest)
    assert done.returncode == 2, done.stderr
    assert "odd.jsonl:3" in done.stderr or "odd.jsonl:1" in done.stderr
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------ names and numbers


@pytest.mark.parametrize("name", ["a" * 5000, "a" * 256, "春" * 100, "a/" * 3000, "\0", "../a"])
def test_names_that_no_file_can_have(files: seeds.Seeds, name: str) -> None:
    folder = files.folder / "named"
    folder.mkdir(exist_ok=True)
    info = json.loads((files.dataset / "meta.bin").read_text())
    (folder / "meta.bin").write_text(json.dumps({**info, "file_name": name}))
    message = refusal(lambda: read_meta(folder), 10_000)
    assert "file_name: expected the name of a file" in message
    index = json.dumps({"weight_map": {"a": name}}).encode()
    path = files.path("named.safetensors.index.json", index)
    message = refusal(lambda: Checkpoint(path), 10_000)
    assert "is not the name of a file beside the index" in message
    checkpoint = files.path("named.bin", files.checkpoint)
    files.path("named.json", json.dumps({"vocab": name}).encode())
    files.path("vocab.txt", files.vocabulary)
    load_pretrained(str(checkpoint), "auto", None, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("value", [2**31, 2**63, 10**30, 10**400])
@pytest.mark.parametrize(
    "key", ["vocab_size", "dim_model", "num_heads", "dim_head", "dim_ff", "num_layers"]
)
def test_sizes_of_no_model(files: seeds.Seeds, key: str, value: int) -> None:
    config = {**json.loads(files.config_file), key: value}
    path = str(files.path("sizes.json", json.dumps(config).encode()))
    vocabulary = str(files.path("vocab.txt", files.vocabulary))
    message = refusal(
        lambda: load_pretrained(None, path, vocabulary, torch.float32, torch.device("cpu")), 1000
    )
    assert f'"{key}" must be at most' in message


@pytest.mark.parametrize("key", ["eps", "distance_scale"])
@pytest.mark.parametrize("value", [b"1e999", b"Infinity", b"NaN", b"9" * 400])
def test_numbers_that_are_not_finite(files: seeds.Seeds, key: str, value: bytes) -> None:
    config = json.dumps({**json.loads(files.config_file), key: "RAW"}).encode()
    path = files.path("finite.json", config.replace(b'"RAW"', value))
    message = refusal(lambda: ModelConfig.load(path), 1000)
    assert f'"{key}" must be' in message


def test_meta_numbers(files: seeds.Seeds) -> None:
    folder = files.folder / "numbers"
    folder.mkdir(exist_ok=True)
    info = json.loads((files.dataset / "meta.bin").read_text())
    for key in ("block_begin", "block_end", "nbytes", "nlines", "block_size"):
        for value in (2**63, 10**400, -1, 0.5, None, "1", True):
            (folder / "meta.bin").write_text(json.dumps({**info, key: value}))
            message = refusal(lambda: read_meta(folder), 1000)
            assert f"{key}: expected a number" in message
