"""Files of each kind with checksums, and what loading gives once one of their bits is flipped."""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import tiny
import torch

from cpm_bee import delta
from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.preprocess.pipeline import preprocess
from cpm_bee.data.token_index import soundness
from cpm_bee.data.token_index.reader import TokenIndex
from cpm_bee.data.token_index.writer import folder_name
from cpm_bee.delta import DeltaConfig
from cpm_bee.errors import InputError
from cpm_bee.pretrained import load_pretrained
from cpm_bee.records import Record
from cpm_bee.train.checkpoints import RunFiles
from cpm_bee.train.provenance import RunProvenance
from cpm_bee.train.training_state import TrainingState

CPU = torch.device("cpu")


class Flip(NamedTuple):
    """A bit of a file, counted from its beginning."""

    path: Path
    bit: int


class Loaded(NamedTuple):
    """What loading gave: values (None: it was refused), and all that was said."""

    values: Any
    text: str


class Kind(NamedTuple):
    """Files of a kind.

    Attributes:
        files: those in which a bit may be flipped.
        load: reads all of them; equal if nothing has changed.
        replacements: other values that it may give if it names the damaged file.
        makes: loading makes damaged files again from others, which takes time.
    """

    files: Sequence[Path]
    load: Callable[[], Any]
    replacements: Sequence[Any] = ()
    makes: bool = False

    def draw(self, rng: random.Random) -> Flip:
        """Choose a file, and one of its bits."""
        path = rng.choice(self.files)
        return Flip(path, rng.randrange(8 * path.stat().st_size))

    def outcome(self, flip: Flip, intact: Any) -> str:
        """Load with a flipped bit; restores the files.

        Returns:
            "refused" or "replaced" with the name of the file, "equal" for the same values, or
            "silent" for all that must not be.
        """
        contents = {path: path.read_bytes() for path in self.files}
        times = {path: path.stat() for path in self.files}
        try:
            changed = bytearray(contents[flip.path])
            changed[flip.bit // 8] ^= 1 << flip.bit % 8
            # Overwritten in place: damage changes neither the file nor its time.
            flip.path.write_bytes(changed)
            _set_times(times)
            loaded = self._loaded()
        finally:
            for path, content in contents.items():
                path.write_bytes(content)
            _set_times(times)
        is_named = any(str(path) in loaded.text for path in (flip.path, flip.path.parent))
        if loaded.values is None:
            return "refused" if is_named else "silent"
        if is_equal(loaded.values, intact):
            return "equal"
        is_known = any(is_equal(loaded.values, known) for known in self.replacements)
        return "replaced" if is_known and is_named else "silent"

    def _loaded(self) -> Loaded:
        messages: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
        logger = logging.getLogger("cpm_bee")
        logger.addHandler(handler)
        try:
            return Loaded(self.load(), "\n".join(messages))
        except InputError as error:
            return Loaded(None, "\n".join([*messages, str(error)]))
        finally:
            logger.removeHandler(handler)


def _set_times(times: dict[Path, Any]) -> None:
    for path, stat in times.items():
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def is_equal(a: Any, b: Any) -> bool:
    """Whether values are equal; those of tensors bit by bit, NaN included."""
    if torch.is_tensor(a) and torch.is_tensor(b):
        return a.dtype == b.dtype and a.shape == b.shape and _bytes(a) == _bytes(b)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(is_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(is_equal, a, b))
    return type(a) is type(b) and a == b


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def state_of(step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an engine and a trainer save at a step."""
    generator = torch.Generator().manual_seed(step)
    tensors = {f"layer.{i}": torch.randn(3, 40, generator=generator) for i in range(3)}
    moments = {
        name: {"exp_avg": t * 0.1, "exp_avg_sq": t * t, "step": torch.tensor(float(step))}
        for name, t in tensors.items()
    }
    engine = {"tensors": tensors, "optimizer": moments, "loss_scale": 1.0, "good_steps": step}
    return engine, asdict(TrainingState(step=step, saved_step=step, best_loss=1 / (step + 1)))


def run_files(folder: Path) -> RunFiles:
    provenance = RunProvenance(tiny.make_config(), "vocab", "base", "v", "e", DeltaConfig())
    return RunFiles(str(folder), "run", provenance)


def states(folder: Path) -> Kind:
    """The state of step 30, and an earlier one of step 20."""
    files = run_files(folder)
    for step in (20, 30):
        files.save_state(*state_of(step), settings={"seed": 1})
    return Kind([files.state], lambda: list(files.load_state({"seed": 1})), [list(state_of(20))])


def deltas(folder: Path) -> Kind:
    model = tiny.make_model(1)
    config = DeltaConfig(rank=4, alpha=48)
    delta.insert(model, config, seed=3)
    path = folder / "run-delta-best.pt"
    delta.save(path, delta.tensors(model), config, "0" * 64, "1" * 64)

    def load() -> Any:
        fresh = tiny.make_model(1)
        config = delta.load(fresh, path, "0" * 64, "1" * 64)
        return [delta.tensors(fresh), asdict(config)]

    return Kind([path, path.with_suffix(".json")], load)


def quantized(folder: Path) -> Kind:
    """The file of a base in NF4, which is made again."""
    model = tiny.make_model(1, dim_model=64, num_heads=4, dim_head=16, dim_ff=64, num_layers=1)
    torch.save({n: t.half() for n, t in model.state_dict().items()}, folder / "base.bin")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    tiny.write_vocabulary(folder / "vocab.txt")

    def load() -> Any:
        base = load_pretrained(
            str(folder / "base.bin"), "auto", None, torch.float32, CPU, quantize="nf4"
        )
        # Copies: the values are mapped from a file that is about to change.
        return {name: p.detach().clone() for name, p in base.model.named_parameters()}

    load()
    return Kind([folder / "base.nf4.safetensors"], load, makes=True)


def make_dataset(folder: Path) -> Path:
    """Several blocks of records and of tokens, some with answers that training shuffles."""
    rng = random.Random(1)
    records: list[Record] = []
    for number in range(190):
        text = "".join(rng.choices(["春", "天", "风", "é", "a b"], k=90))
        answer: Any = "天" if number % 3 else {"a": "春", "b": "é"}
        records.append({"input": text, "<ans>": answer})
    source = folder / "set.jsonl"
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    source.write_text("".join(lines), encoding="utf-8")
    preprocess(source, folder, "data", seed=0, overwrite=False, block_size=1 << 17)
    return folder / "set"


def datasets(folder: Path) -> Kind:
    path = make_dataset(folder)

    def load() -> Any:
        dataset = BinaryDataset(path)
        found = list(dataset)
        assert all(dataset.read(file, offset) for file, offset, _ in found[::50])
        return [found, [(info.file_name, info.nlines) for info in dataset.files]]

    return Kind([path / name for name in ("data", "meta.bin", "checksums.json")], load)


def token_index(folder: Path, *, is_large: bool = False) -> Kind:
    path = make_dataset(folder)

    def load() -> Any:
        with mock.patch.object(soundness, "_SMALL", 0 if is_large else soundness._SMALL):
            index = TokenIndex.of(BinaryDataset(path), tiny.TOKENIZER)
            numbers = range(len(index))
            stream = index.stream(numbers, random.Random)
            return [
                {name: np.asarray(value).tolist() for name, value in vars(stream).items()},
                index.lengths.tolist(), index.num_targets.tolist(), index.answers.tolist(),
                [index.location(number) for number in numbers],
                index.extension_pairs(index.largest_subs(numbers)),
            ]  # fmt: skip

    load()
    files = sorted((path / folder_name(tiny.TOKENIZER)).iterdir())
    return Kind(files, load, makes=True)


def large_token_index(folder: Path) -> Kind:
    return token_index(folder, is_large=True)


KINDS: dict[str, Callable[[Path], Kind]] = {
    "states": states,
    "deltas": deltas,
    "quantized base": quantized,
    "datasets": datasets,
    "token index": token_index,
    "large token index": large_token_index,
}
