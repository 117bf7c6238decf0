"""A small model, its records and batches, and training steps on them: what the steps compare."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from cpm_bee import delta
from cpm_bee.data.batch import Batch, collate
from cpm_bee.doctor.bounds import double_precision, nudge
from cpm_bee.encoding import Encoder
from cpm_bee.engine import OptimizerSettings
from cpm_bee.engine.protocol import StepResult
from cpm_bee.engine.torch_engine import TorchEngine
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.initialization import initial_values
from cpm_bee.model.network import CPMBee
from cpm_bee.records import Record
from cpm_bee.tokenizer import REQUIRED, Tokenizer

_LETTERS = "abcdefghijklmnop0123456789春夏秋冬"
TOKENIZER = Tokenizer([*REQUIRED, "<mask>", "<option>", *_LETTERS], source="doctor's vocabulary")
SETTINGS = OptimizerSettings(
    weight_decay=0.01, clip_grad=1.0, loss_scale=1024.0, loss_scale_factor=2.0, loss_scale_steps=4
)


def make_config(device: torch.device) -> ModelConfig:
    """Returns a small config; on a GPU, large enough for the kernels that real sizes use."""
    heads, dim_head = (2, 16) if device.type == "cpu" else (4, 64)
    return ModelConfig(
        vocab_size=len(TOKENIZER),
        dim_model=heads * dim_head,
        num_heads=heads,
        dim_head=dim_head,
        dim_ff=2 * heads * dim_head,
        num_layers=2,
        position_bias_num_segment_buckets=256,
    )


def make_model(config: ModelConfig, *, lora: bool, dropout: float = 0.0) -> CPMBee:
    """Returns a model with the initial values of a random start; its LoRA is not at zero."""
    model = CPMBee(config)
    model.load_state_dict(dict(initial_values(model, 0)))
    if lora:
        delta.insert(model, delta.DeltaConfig(dropout=dropout), seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("lora_B"):
                    p.copy_(0.02 * torch.randn(p.shape, generator=generator))
    return model


def hold(model: CPMBee, dtype: torch.dtype) -> CPMBee:
    """Hold the frozen weights of a model in a dtype, as a run does; its LoRA stays fp32."""
    for p in model.parameters():
        if not p.requires_grad and p.is_floating_point():
            p.data = p.data.to(dtype)
    return model


def records(count: int, seed: int = 0) -> list[Record]:
    """Makes records of very different lengths, each with an answer."""
    rng = random.Random(seed)
    made: list[Record] = []
    for number in range(count):
        word = "".join(rng.choices(_LETTERS, k=rng.choice((1, 3, 17, 40, 90))))
        if number % 2:
            made.append({"input": word, "question": "春", "<ans>": word[:8]})
        else:
            options: Record = {f"<option_{i}>": c for i, c in enumerate(rng.sample(_LETTERS, 3))}
            made.append({"input": word, "options": options, "<ans>": "<option_1>"})
    return made


def batch_of(some: Sequence[Record]) -> Batch:
    encoder = Encoder(TOKENIZER)
    return collate([encoder.encode(record) for record in some], TOKENIZER)


@dataclass
class Training:
    """What some steps gave.

    Attributes:
        gradients: those of the first step.
        updates: how far all steps together have moved each weight.
        weights: the trained weights at the end.
    """

    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    updates: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    results: list[StepResult] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    engine: TorchEngine | None = None


def train(
    model: CPMBee,
    batches: Sequence[Batch],
    device: torch.device,
    dtype: torch.dtype,
    settings: OptimizerSettings = SETTINGS,
    *,
    attention: str = "sdpa",
    lr: float = 1e-3,
    prepare: Callable[[CPMBee], None] = lambda model: None,
) -> Training:
    """Train a copy of a model, one step a batch; dropout masks are seeded by the step.

    Args:
        prepare: changes the copy before it is trained.
    """
    model = copy.deepcopy(model).to(device).train()
    model.attention = attention
    prepare(model)
    engine = TorchEngine(device, dtype)
    engine.prepare(model, settings)
    done = Training(engine=engine)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in trained.items()}
    for step, batch in enumerate(batches):
        torch.manual_seed(step)
        with engine.autocast():
            loss = model.loss(batch.to(device)) / batch.num_targets
        engine.backward(loss)
        done.losses[f"loss {step}"] = loss.detach().cpu()
        if step == 0:
            scale = engine.loss_scale
            found = {n: p.grad for n, p in trained.items() if p.grad is not None}
            done.gradients = {n: g.cpu() / scale for n, g in found.items()}
        done.results.append(engine.step(lr))
        done.scales.append(engine.loss_scale)
    done.updates = {n: (p.detach() - before[n]).cpu() for n, p in trained.items()}
    done.weights = {n: p.detach().cpu() for n, p in trained.items()}
    return done


def train_exactly(model: CPMBee, batches: Sequence[Batch], lr: float = 1e-3) -> Training:
    """The same in double precision on the CPU."""
    with double_precision():
        double = copy.deepcopy(model).double()
        return train(double, batches, torch.device("cpu"), torch.float32, lr=lr)


def train_trusted(
    model: CPMBee,
    batches: Sequence[Batch],
    dtype: torch.dtype,
    samples: int = 3,
    lr: float = 1e-3,
) -> list[Training]:
    """The same in a dtype on the CPU: once as it is, then with the last bits moved by chance.

    Weights in 16 bit are left alone: their last bit is far more than the rounding of the products.
    """
    made = []
    for seed in range(samples):
        nudged = copy.deepcopy(model)
        if seed:
            wide = {n: p for n, p in nudged.named_parameters() if p.dtype == torch.float32}
            nudge(wide, seed)
        made.append(train(nudged, batches, torch.device("cpu"), dtype, lr=lr))
    return made
