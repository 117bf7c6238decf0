"""Every reader of the product, with a source of inputs for it.

An input is bytes. A reader must end in a result or in one of `EXPECTED`; whatever the limits of
`fuzz.limits` do not allow, and any other exception, is a fault.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import data_reformat
import torch

from cpm_bee import checksums, delta
from cpm_bee.checkpoint import peft_adapter
from cpm_bee.checkpoint.reader import Checkpoint
from cpm_bee.checkpoint.sidecar import METADATA
from cpm_bee.data import record_pickle
from cpm_bee.data.bin_dataset import BinaryDataset, frame
from cpm_bee.data.preprocess.pipeline import preprocess
from cpm_bee.data.record_source import read_records
from cpm_bee.data.token_index.reader import TokenIndex
from cpm_bee.data.token_index.writer import INFO, folder_name
from cpm_bee.encoding import Encoder
from cpm_bee.errors import CpmBeeError, InputError
from cpm_bee.extension import Extension
from cpm_bee.generate.jsonl import check_vocabulary
from cpm_bee.model.config import ModelConfig
from cpm_bee.pretrained import load_pretrained, open_pretrained
from cpm_bee.quantize.cache import cache_path, quantized_entries
from cpm_bee.quantize.formats import FORMATS
from cpm_bee.tokenizer import Tokenizer
from cpm_bee.train import replay_report
from cpm_bee.train.checkpoints import RunFiles
from cpm_bee.train.options import Options
from cpm_bee.train.provenance import RunProvenance
from cpm_bee.train.receipt_reader import read_receipt
from cpm_bee.train.replay import first_part
from cpm_bee.train.replay_options import ReplayOptions
from cpm_bee.train.replay_settings import replay_settings
from cpm_bee.train.training_state import TrainingState
from fuzz import mutate, seeds
from fuzz.seeds import Seeds

EXPECTED = (CpmBeeError, data_reformat.BadInput)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        make: an input.
        read: reads inputs; raises what the reader raises.
        share: of all inputs, relative to other targets.
        batch: inputs that are read together.
    """

    name: str
    make: Callable[[random.Random], bytes]
    read: Callable[[list[bytes]], None]
    share: int
    batch: int = 1


def one(read: Callable[[bytes], None]) -> Callable[[list[bytes]], None]:
    def read_all(inputs: list[bytes]) -> None:
        for content in inputs:
            try:
                read(content)
            except EXPECTED:
                continue

    return read_all


# ------------------------------------------------------------------ lines and texts


def _line(values: list[Any], rng: random.Random) -> bytes:
    line = mutate.mutate_json(rng, rng.choice(values))
    return line if rng.random() < 0.1 else line.replace(b"\n", b" ")


def _lines(inputs: list[bytes], valid: Any) -> bytes:
    """Lines of JSON; a valid one comes first where there are several, so that all are read."""
    first = seeds.json_lines([valid]) if len(inputs) > 1 else b""
    return first + b"\n".join(inputs)


def read_raw(seed_files: Seeds, inputs: list[bytes]) -> None:
    source = seed_files.path("raw.jsonl", _lines(inputs, seeds.RAW[0]))
    data_reformat.reformat_files(source, seed_files.folder / "bee", "春", skip_bad=True)


def read_json_records(seed_files: Seeds, inputs: list[bytes]) -> None:
    """As generation and as preprocessing read them; then those of the lines that are right."""
    good = []
    for content in [_lines(inputs, seeds.RECORDS[0]), *inputs]:
        path = seed_files.path("lines.jsonl", content)
        try:
            found = read_records(str(path))
            check_vocabulary(found, Encoder(seed_files.tokenizer))
        except InputError:
            continue
        good += [entry.record for entry in found]
    for content in (_lines(inputs, seeds.RECORDS[0]), seeds.json_lines(good)):
        try:
            datasets = preprocess(
                seed_files.path("lines.jsonl", content),
                seed_files.folder / "preprocessed",
                "data",
                seed=0,
                overwrite=True,
                block_size=1 << 16,
                tokenizer=seed_files.tokenizer,
                escape=len(content) % 2 == 1,
            )
        except InputError:
            continue
        for dataset in datasets:
            use_index(TokenIndex.of(dataset, seed_files.tokenizer))


def make_text(rng: random.Random) -> bytes:
    text = "".join(mutate.choose_text(rng) for _ in range(rng.randrange(1, 5)))
    return text.encode("utf-8", "surrogatepass")


def read_text(seed_files: Seeds, content: bytes) -> None:
    tokenizer = seed_files.tokenizer
    try:
        text = content.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    extension = Extension(tokenizer)
    ids = tokenizer.encode(text, extension)
    tokenizer.decode(ids, extension)
    Encoder(tokenizer).encode({"input": text, text: "a", "<ans>": text})


# ------------------------------------------------------------------ binary datasets


def make_meta(seed_files: Seeds, rng: random.Random) -> bytes:
    values = [json.loads(line) for line in (seed_files.dataset / "meta.bin").open()]
    parts = [mutate.mutate_json(rng, rng.choice(values)) for _ in range(rng.choice([1, 1, 2]))]
    return b"\n".join(parts)


def read_dataset(folder: Path) -> None:
    dataset = BinaryDataset(folder)
    len(dataset)
    hash(dataset.fingerprint)
    for file, offset, _ in dataset:
        try:
            dataset.read(file, offset)
        except InputError:
            continue


def read_meta(seed_files: Seeds, content: bytes) -> None:
    folder = seed_files.folder / "meta"
    folder.mkdir(exist_ok=True)
    (folder / "data").write_bytes((seed_files.dataset / "data").read_bytes())
    (folder / "meta.bin").write_bytes(content)
    read_dataset(folder)


def make_data(seed_files: Seeds, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return mutate.mutate_bytes(rng, (seed_files.dataset / "data").read_bytes())
    return b"".join(frame(make_payload(rng)) for _ in range(3)) + b"\0"


def read_data(seed_files: Seeds, content: bytes) -> None:
    """The content with zeros to whole blocks, and a `meta.bin` that fits."""
    size = max(4096, 1 << (len(content) - 1).bit_length()) if content else 4096
    meta = {"file_name": "data", "block_begin": 0, "block_end": 1, "nbytes": 1, "nlines": 3}
    folder = seed_files.folder / "data"
    folder.mkdir(exist_ok=True)
    (folder / "data").write_bytes(content.ljust(size, b"\0"))
    (folder / "meta.bin").write_text(json.dumps(meta | {"mask": False, "block_size": size}))
    read_dataset(folder)


def make_payload(rng: random.Random) -> bytes:
    payload = record_pickle.encode(rng.choice(seeds.RECORDS))
    return mutate.mutate_pickle(rng, payload)


def read_payload(content: bytes) -> None:
    record_pickle.decode(content)


# ------------------------------------------------------------------ token index


def _index_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make_index(seed_files: Seeds, rng: random.Random) -> bytes:
    """The number of the file that is replaced, and its content."""
    folder = seed_files.dataset / folder_name(seed_files.tokenizer)
    names = _index_files(folder)
    name = INFO if rng.random() < 0.4 else rng.choice(names)
    content = (folder / name).read_bytes()
    if name == INFO:
        changed = mutate.mutate_json(rng, json.loads(content))
    else:
        changed = mutate.mutate_bytes(rng, content)
        if rng.random() < 0.8:  # nothing but the size is checked first
            changed = changed[: len(content)].ljust(len(content), b"\0")
    return bytes([names.index(name)]) + changed


def read_index(seed_files: Seeds, content: bytes) -> None:
    folder = seed_files.dataset / folder_name(seed_files.tokenizer)
    names = _index_files(folder)
    path = folder / names[content[0] % len(names)] if content else folder / INFO
    before = {name: (folder / name).read_bytes() for name in names}
    path.write_bytes(content[1:])
    try:
        use_index(TokenIndex.of(BinaryDataset(seed_files.dataset), seed_files.tokenizer))
    finally:
        for name, good in before.items():
            (folder / name).write_bytes(good)


def use_index(index: TokenIndex) -> None:
    """All that training asks of an index."""
    numbers = list(range(len(index)))
    try:
        index.stream(numbers)
        index.stream(numbers, random.Random)
        index.extension_pairs(index.largest_subs(numbers))
    except InputError:
        pass
    for number in numbers:
        try:
            index.record(number)
            index.source(number)
        except InputError:
            continue


# ------------------------------------------------------------------ weights


def make_checkpoint(seed_files: Seeds, rng: random.Random) -> bytes:
    kind = rng.random()
    if kind < 0.5:
        return mutate.mutate_zip(rng, seed_files.checkpoint)
    if kind < 0.65:
        return mutate.mutate_bytes(rng, seed_files.legacy)
    values = dict(torch.load(_stream(seed_files.checkpoint), weights_only=True))
    return seeds.torch_file(mutate_tensors(rng, values), legacy=rng.random() < 0.1)


def _stream(content: bytes) -> Any:
    import io

    return io.BytesIO(content)


def mutate_tensors(rng: random.Random, values: dict[Any, Any]) -> Any:
    """A dictionary of tensors, some of them replaced, renamed or left out."""
    for _ in range(rng.randrange(1, 4)):
        name = rng.choice(list(values))
        kind = rng.randrange(6)
        if kind == 0:
            del values[name]
        elif kind == 1:
            layer = rng.choice(["0", "1", "999", "1000", "9999", "99999"])
            new = rng.choice([mutate.choose_text(rng), str(name).replace(".0.", f".{layer}.")])
            values[new] = values.pop(name)
        elif kind == 2:
            values[mutate.choose_text(rng)] = choose_tensor(rng, values[name])
        elif kind == 3 and isinstance(name, str):
            values[rng.choice(["cpmbee." + name, "lm_head.weight", 1, (1, 2)])] = values[name]
        else:
            values[name] = choose_tensor(rng, values[name])
        if not values:
            break
    return values if rng.random() < 0.97 else rng.choice([[], list(values.values()), "a", None])


def choose_tensor(rng: random.Random, like: Any) -> Any:
    """Something that is like a tensor, or is not."""
    plain = torch.is_tensor(like) and like.layout == torch.strided
    plain = plain and not like.is_quantized and not like.is_meta
    if not plain or not 0 < like.numel() < 1 << 16:
        return mutate.choose_value(rng)
    large = rng.choice([1 << 20, 1 << 33, 1 << 40])
    makers: list[Callable[[], Any]] = [
        lambda: mutate.choose_value(rng),
        lambda: like.float(),
        lambda: like.long(),
        lambda: like.to(torch.complex64),
        lambda: like.double(),
        lambda: like.reshape(-1)[:1].expand(large),
        lambda: like.reshape(-1)[:1].view(1, 1).expand(large, 8),
        lambda: like.reshape(-1)[:1].view(1, 1).expand(8, large),
        lambda: like.t() if like.dim() == 2 else like[None],
        lambda: like.float().to_sparse(),
        lambda: like.to("meta"),
        lambda: like[:0] if like.dim() else like,
        lambda: like.reshape(-1)[:1].reshape(()),
        lambda: torch.full_like(like, float("nan")) if like.is_floating_point() else like,
        lambda: torch.quantize_per_tensor(like.float(), 0.1, 0, torch.qint8),
        lambda: torch.nn.Parameter(like) if like.is_floating_point() else like,
        lambda: like.repeat(2, *[1] * (like.dim() - 1)) if like.dim() else like,
    ]
    return rng.choice(makers)()


def read_checkpoint(seed_files: Seeds, suffix: str, content: bytes) -> None:
    path = seed_files.path(f"model.{suffix}", content)
    for extra in (path.with_suffix(".json"), path.parent / "config.json"):
        extra.unlink(missing_ok=True)
    vocabulary = seed_files.path("vocab.txt", seed_files.vocabulary)
    load_pretrained(str(path), "auto", str(vocabulary), torch.float32, CPU)


def make_safetensors(seed_files: Seeds, rng: random.Random) -> bytes:
    content = seed_files.safetensors
    size = int.from_bytes(content[:8], "little")
    if rng.random() < 0.3:
        return mutate.mutate_bytes(rng, content)
    header = mutate.mutate_json(rng, json.loads(content[8 : 8 + size]))
    length = len(header) if rng.random() < 0.9 else rng.choice(mutate.NUMBERS) % 2**64
    return length.to_bytes(8, "little") + header + content[8 + size :]


def make_shards(seed_files: Seeds, rng: random.Random) -> bytes:
    header = seed_files.safetensors[8:]
    size = int.from_bytes(seed_files.safetensors[:8], "little")
    names = [name for name in json.loads(header[:size]) if name != "__metadata__"]
    return mutate.mutate_json(rng, {"weight_map": dict.fromkeys(names, "shard.safetensors")})


def read_shards(seed_files: Seeds, content: bytes) -> None:
    seed_files.path("shard.safetensors", seed_files.safetensors)
    Checkpoint(seed_files.path("model.safetensors.index.json", content))


def make_sidecar(seed_files: Seeds, rng: random.Random) -> bytes:
    config = json.loads(seed_files.config_file)
    return mutate.mutate_json(rng, {"config": config, "vocab": "vocab.txt", "written_by": "a"})


def read_sidecar(seed_files: Seeds, content: bytes) -> None:
    path = seed_files.path("with_sidecar.bin", seed_files.checkpoint)
    path.with_suffix(".json").write_bytes(content)
    seed_files.path("vocab.txt", seed_files.vocabulary)
    open_pretrained(str(path), "auto", None, torch.float32)


def make_config(seed_files: Seeds, rng: random.Random) -> bytes:
    config = json.loads(seed_files.config_file)
    if rng.random() < 0.3:
        config["mask_modules"] = [[False, False]]
    if rng.random() < 0.3:
        config["hidden_size"] = config.pop("dim_model")
    return mutate.mutate_json(rng, config)


def read_config(seed_files: Seeds, content: bytes) -> None:
    """Beside a checkpoint, given for a checkpoint, and of a random start.

    Random values take the memory that their config asks for; here they are made of small ones.
    """
    path = seed_files.path("given.json", content)
    vocabulary = str(seed_files.path("vocab.txt", seed_files.vocabulary))
    checkpoint = str(seed_files.path("pytorch_model.bin", seed_files.checkpoint))
    seed_files.path("config.json", content)
    for load, config in [(checkpoint, "auto"), (checkpoint, str(path)), (None, str(path))]:
        try:
            if load is None:
                with torch.device("meta"):
                    model = seeds.CPMBee(ModelConfig.load(path))
                if 1e6 < sum(p.numel() for p in model.parameters()) < 1e11:
                    continue
            open_pretrained(load, config, vocabulary, torch.float32)
        except CpmBeeError:
            continue


def make_vocabulary(seed_files: Seeds, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return mutate.mutate_bytes(rng, seed_files.vocabulary)
    tokens = list(seeds.TOKENS)
    for _ in range(rng.randrange(1, 4)):
        tokens[rng.randrange(len(tokens))] = mutate.choose_text(rng)
    return "\n".join(tokens).encode("utf-8", "surrogatepass")


def read_vocabulary(seed_files: Seeds, content: bytes) -> None:
    tokenizer = Tokenizer.load(seed_files.path("given.txt", content))
    encoder = Encoder(tokenizer)
    for record in seeds.RECORDS:
        try:
            encoder.encode(record)
        except CpmBeeError:
            continue
    hash(tokenizer.fingerprint)


# ------------------------------------------------------------------ deltas and states


def make_delta(seed_files: Seeds, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return mutate.mutate_zip(rng, rng.choice([seed_files.delta, seed_files.delta_whole]))
    values = dict(torch.load(_stream(seed_files.delta), weights_only=True))
    if rng.random() < 0.3:
        noted = mutate.mutate_json(rng, json.loads(seed_files.delta_sidecar))
        values[METADATA] = torch.frombuffer(bytearray(noted or b"{"), dtype=torch.uint8)
    return seeds.torch_file(mutate_tensors(rng, values))


def read_delta(seed_files: Seeds, content: bytes) -> None:
    path = seed_files.path("fuzz-delta.pt", content)
    path.with_suffix(".json").unlink(missing_ok=True)
    delta.load(seed_files.model, path, seeds.BASE_FINGERPRINT, seed_files.tokenizer.fingerprint)


def make_delta_sidecar(seed_files: Seeds, rng: random.Random) -> bytes:
    return mutate.mutate_json(rng, json.loads(seed_files.delta_sidecar))


def read_delta_sidecar(seed_files: Seeds, content: bytes) -> None:
    path = seed_files.path("sidecar-delta.pt", seed_files.delta)
    path.with_suffix(".json").write_bytes(content)
    delta.load(seed_files.model, path, seeds.BASE_FINGERPRINT, seed_files.tokenizer.fingerprint)


def make_adapter(rng: random.Random) -> bytes:
    """The config of a PEFT adapter, whose weights stay as they are."""
    config: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 16, "bias": "none"}
    for name in ("use_rslora", "use_dora", "init_lora_weights", "rank_pattern", "target_modules"):
        if rng.random() < 0.3:
            config[name] = rng.choice([True, False, None, {}, ["project_q"]])
    return mutate.mutate_json(rng, config)


def read_adapter(seed_files: Seeds, content: bytes) -> None:
    folder = seed_files.folder / "adapter"
    if not folder.exists():
        folder.mkdir()
        path = seed_files.path("adapter-delta.pt", seed_files.delta_whole)
        peft_adapter.write_adapter(folder, delta.DeltaFile.read(path), None)
    (folder / peft_adapter.CONFIG).write_bytes(content)
    peft_adapter.read_adapter(folder).insert_into(seed_files.model)


SETTINGS = {"records of --dataset": "a" * 64, "rows of a step": 4, "--seed": 0, "--drop": False}


def run_files(seed_files: Seeds) -> RunFiles:
    provenance = RunProvenance(
        seed_files.config,
        "vocab.txt",
        seeds.BASE_FINGERPRINT,
        seed_files.tokenizer.fingerprint,
        "",
        seed_files.delta_config,
    )
    return RunFiles(str(seed_files.folder), "fuzz", provenance)


def state_file(seed_files: Seeds) -> bytes:
    files = run_files(seed_files)
    state = seed_files.engine.training_state()
    files.save_state(state, asdict(TrainingState(step=3, saved_step=3)), SETTINGS)
    return files.state.read_bytes()


def make_state(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return mutate.mutate_zip(rng, content)
    state = torch.load(_stream(content), weights_only=True)
    nodes = [state, *state.values(), *state["engine"].values()]
    nodes += state["engine"]["optimizer"].values()
    nodes = [node for node in nodes if isinstance(node, dict) and node]
    for _ in range(rng.randrange(1, 3)):
        node = rng.choice(nodes)
        if not node:
            continue
        name = rng.choice(list(node))
        if rng.random() < 0.3:
            del node[name]
        else:
            node[name] = choose_tensor(rng, node[name])
    return seeds.torch_file(state)


def read_state(seed_files: Seeds, content: bytes) -> None:
    """As `Trainer.resume` does."""
    files = run_files(seed_files)
    files.state.write_bytes(content)
    engine_state, progress = files.load_state(SETTINGS)
    seed_files.engine.load_training_state(engine_state)
    TrainingState(**progress)


# ------------------------------------------------------------------ the quantized base


class QuantizedBase:
    """A checkpoint whose sizes NF4 can hold, and the file that is made of it once."""

    def __init__(self, folder: Path) -> None:
        config = seeds.model_config(dim_model=64, num_heads=1, dim_head=64, dim_ff=64)
        self._config = config
        tensors = {n: p.detach().half() for n, p in seeds.model(config).named_parameters()}
        path = folder / "quantized.bin"
        path.write_bytes(seeds.torch_file(tensors))
        self._checkpoint = Checkpoint(path)
        self._path = cache_path(path, FORMATS["nf4"])
        self._entries()
        self._good = self._path.read_bytes()

    def _entries(self) -> None:
        with torch.device("meta"):
            model = seeds.CPMBee(self._config)
        for entry in quantized_entries(model, self._checkpoint, "nf4").values():
            entry.read()

    def make(self, rng: random.Random) -> bytes:
        size = int.from_bytes(self._good[:8], "little")
        if rng.random() < 0.4:
            return mutate.mutate_bytes(rng, self._good)
        header = mutate.mutate_json(rng, json.loads(self._good[8 : 8 + size]))
        return len(header).to_bytes(8, "little") + header + self._good[8 + size :]

    def read(self, content: bytes) -> None:
        self._path.unlink(missing_ok=True)  # read values are still mapped from the file before
        self._path.write_bytes(content)
        self._entries()


# ------------------------------------------------------------------ settings and receipts

_YAML = b"lr: 1e-4\nuse-delta: true\ndelta-targets: [w_0, w_1]\nload: &a model\nvocab: *a\n"


def make_settings(rng: random.Random) -> bytes:
    return mutate.mutate_bytes(rng, _YAML)


def read_settings(seed_files: Seeds, content: bytes) -> None:
    path = seed_files.path("run.yaml", content)
    Options.parse(["--config", str(path), "--dataset", "x"])


_FILE = {"path": "/x", "fingerprint": "a", "kind": "sha256", "value": "b"}
_PART: dict[str, Any] = {
    "steps_before": 0,
    "folder": "/",
    "settings": {"dataset": "x", "lr": 0.1, "use_delta": True, "delta_targets": ["w_0"]},
    "code": {"source": "a", "commit": None, "changed": False},
    "environment": {
        **{"threads": 1, "ranks": 2, "dtype": "float32", "device": "cpu", "attention": "sdpa"},
        **{"sharded": False, "checkpointing": False, "variables": {}, "gpu": None},
    },
    "data": {"dataset": [{**_FILE, "records": 3, "weight": 1.0}]},
    "vocabulary": {**_FILE, "tokens": 3},
    "base": {"path": "/x", "fingerprint": "a", "files": [{"name": "x", "bytes": 1}]},
    "init_delta": None,
}


def make_receipt(rng: random.Random) -> bytes:
    """Mostly with a checksum that is right, as one who writes a receipt can make it."""
    values = {"format": 1, "status": "finished", "parts": [_PART], "result": {"step": 3}}
    content = mutate.mutate_json(rng, values)
    try:
        changed = json.loads(content)
    except (ValueError, RecursionError):
        return content
    if not isinstance(changed, dict) or rng.random() < 0.2:
        return content
    return json.dumps(checksums.sealed({**changed, "format": 1})).encode()


def read_receipt_file(seed_files: Seeds, content: bytes) -> None:
    """As verify.py does, up to the files that the receipt names."""
    path = str(seed_files.path("run-receipt.json", content))
    part = first_part(read_receipt(path), path)
    assert all(isinstance(line, str) for line in replay_report.differences(part, _PART))
    replay_report.compared_by_fingerprint(part, _PART)
    replay_report.reasons_to_differ(part, dropout=False)
    replay_settings(part, ReplayOptions(receipt=path), 3, "/nowhere")


def make_targets(folder: Path) -> list[Target]:
    """All targets; their files are in `folder`."""
    s = Seeds(folder)
    quantized = QuantizedBase(folder)
    state = state_file(s)
    bind = partial
    return [
        Target("raw", bind(_line, seeds.RAW), bind(read_raw, s), 30, batch=25),
        Target("records", bind(_line, seeds.RECORDS), bind(read_json_records, s), 25, batch=25),
        Target("texts", make_text, one(bind(read_text, s)), 20, batch=20),
        Target("meta", bind(make_meta, s), one(bind(read_meta, s)), 20),
        Target("data", bind(make_data, s), one(bind(read_data, s)), 15),
        Target("payloads", make_payload, one(read_payload), 25, batch=20),
        Target("index", bind(make_index, s), one(bind(read_index, s)), 5),
        Target("checkpoint", bind(make_checkpoint, s), one(bind(read_checkpoint, s, "bin")), 10),
        Target(
            "safetensors",
            bind(make_safetensors, s),
            one(bind(read_checkpoint, s, "safetensors")),
            10,
        ),
        Target("shards", bind(make_shards, s), one(bind(read_shards, s)), 10),
        Target("sidecar", bind(make_sidecar, s), one(bind(read_sidecar, s)), 5),
        Target("config", bind(make_config, s), one(bind(read_config, s)), 5),
        Target("vocabulary", bind(make_vocabulary, s), one(bind(read_vocabulary, s)), 10),
        Target("delta", bind(make_delta, s), one(bind(read_delta, s)), 10),
        Target("adapter", make_adapter, one(bind(read_adapter, s)), 2),
        Target("delta-sidecar", bind(make_delta_sidecar, s), one(bind(read_delta_sidecar, s)), 5),
        Target("state", bind(make_state, state), one(bind(read_state, s)), 10),
        Target("quantized", quantized.make, one(quantized.read), 2),
        Target("settings", make_settings, one(bind(read_settings, s)), 5),
        Target("receipt", make_receipt, one(bind(read_receipt_file, s)), 5),
    ]
