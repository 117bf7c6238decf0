"""Small valid files of every format, to be mutated."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors

from cpm_bee import delta
from cpm_bee.data.preprocess.pipeline import preprocess
from cpm_bee.engine import OptimizerSettings
from cpm_bee.engine.torch_engine import TorchEngine
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.network import CPMBee
from cpm_bee.records import Record
from cpm_bee.tokenizer import REQUIRED, Tokenizer

TOKENS = [*REQUIRED, "<mask>", "<option>", "<sep>", *"abcdefgh0123456789春夏秋冬", "春天", "ab"]
RECORDS: list[Record] = [
    {"input": "ab春天", "question": "夏", "<ans>": "a"},
    {"input": "x<<y", "<ans>": {"春": "a", "夏": {"a": "b", "c": "<mask_0>"}}, "b": "<mask_0>"},
    {"input": "秋", "options": {"<option_0>": "a", "<option_1>": "春天"}, "<ans>": "<option_1>"},
    {"document": "é é", "prompt": "冬", "a": {"b": {"c": {"d": "e"}}}, "<ans>": ""},
]
RAW: list[dict[str, Any]] = [
    {"target": "1", "input": "[翻译]春天[0]ab[1]夏[2]秋[答案]"},
    {"translation": "春天", "choices": ["a", "b", "c"], "answer": 2},
    {"translation": "春天", "choices": ["a", "b"]},
]
BASE_FINGERPRINT = "f" * 64


def model_config(**changes: Any) -> ModelConfig:
    values = {"vocab_size": len(TOKENS), "dim_model": 8, "num_heads": 2, "dim_head": 4}
    values |= {"dim_ff": 8, "num_layers": 1}
    buckets = {"position_bias_num_buckets": 8, "position_bias_num_segment_buckets": 64}
    return ModelConfig(**{**values, **buckets, **changes})


def model(config: ModelConfig) -> CPMBee:
    made = CPMBee(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


def torch_file(value: Any, *, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def json_lines(values: list[Any]) -> bytes:
    return b"".join(json.dumps(v, ensure_ascii=False).encode() + b"\n" for v in values)


class Seeds:
    """All valid files, in memory, and a folder to write their mutations to.

    Attributes:
        dataset: a folder with a binary dataset of `RECORDS` and its token index.
        checkpoint, legacy, safetensors, delta, state: what such a file holds.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = Tokenizer(TOKENS, source="fuzz vocabulary")
        self.config = model_config()
        self.model = model(self.config)
        tensors = {n: p.detach().half() for n, p in self.model.named_parameters()}
        self.vocabulary = "\n".join(TOKENS).encode()
        self.config_file = json.dumps(self.config.to_dict()).encode()
        self.checkpoint = torch_file(tensors)
        self.legacy = torch_file(tensors, legacy=True)
        self.safetensors = save_safetensors({n: t.contiguous() for n, t in tensors.items()})
        (folder / "records.jsonl").write_bytes(json_lines(RECORDS))
        preprocess(
            folder / "records.jsonl",
            folder / "bin",
            "data",
            seed=0,
            overwrite=False,
            block_size=4096,
            tokenizer=self.tokenizer,
        )
        self.dataset = folder / "bin" / "records"
        self.delta_model = model(self.config)
        self.delta_config = delta.DeltaConfig(rank=2)
        delta.insert(self.delta_model, self.delta_config, seed=0)
        self.delta = torch_file(delta.tensors(self.delta_model))
        delta.save(
            folder / "delta.pt",
            delta.tensors(self.delta_model),
            self.delta_config,
            BASE_FINGERPRINT,
            self.tokenizer.fingerprint,
        )
        self.delta_whole = (folder / "delta.pt").read_bytes()  # with its metadata
        self.delta_sidecar = (folder / "delta.json").read_bytes()
        self.engine = TorchEngine(torch.device("cpu"), torch.float32)
        settings = OptimizerSettings(
            weight_decay=0.01, clip_grad=1.0, loss_scale=1.0, loss_scale_factor=2.0,
            loss_scale_steps=10,
        )  # fmt: skip
        self.engine.prepare(self.delta_model, settings)

    def path(self, name: str, content: bytes) -> Path:
        """A file of that content in the folder."""
        path = self.folder / name
        path.write_bytes(content)
        return path
