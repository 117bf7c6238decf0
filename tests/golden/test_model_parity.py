"""The network, its gradients and its optimizer against the golden numbers, in fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from dataset_writer import DatasetWriter
from golden.conftest import Pack, Packed, best_fit, sizes_of
from golden.recipe import assert_equal, fill_weights, read_lines

from cpm_bee import delta
from cpm_bee.data.batch import Batch, collate, make_batch
from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.token_index.reader import TokenIndex
from cpm_bee.engine import OptimizerSettings
from cpm_bee.engine.torch_engine import TorchEngine
from cpm_bee.model.config import ModelConfig
from cpm_bee.model.network import CPMBee, target_loss
from cpm_bee.tokenizer import Tokenizer

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def expected(golden: Path) -> Arrays:
    return dict(np.load(golden / "model.npz"))


@pytest.fixture
def model(golden: Path, expected: Arrays) -> CPMBee:
    model = CPMBee(ModelConfig.load(golden / "model_config.json"))
    fill_weights(model, int(expected["seed"]))
    return model


@pytest.fixture
def tuned(model: CPMBee, expected: Arrays) -> CPMBee:
    """The model with a delta, whose values are golden too."""
    delta.insert(model, delta.DeltaConfig(), seed=0)
    fill_weights(model, int(expected["seed"]))
    return model


def mean_loss(model: CPMBee, batch: Batch) -> torch.Tensor:
    return model.loss(batch) / batch.num_targets


def compared(expected: Arrays, packed: dict[str, Packed]) -> list[int]:
    """The batches whose states, logits and losses are in the golden file."""
    numbers = [b for b in range(len(packed["packing"].batches)) if f"b{b}.loss" in expected]
    assert numbers
    return numbers


def test_states_and_logits(model: CPMBee, expected: Arrays, packed: dict[str, Packed]) -> None:
    for b in compared(expected, packed):
        check_states_and_logits(model, expected, packed["packing"], b)


def check_states_and_logits(model: CPMBee, expected: Arrays, packed: Packed, b: int) -> None:
    arrays, _, steps, batches = packed
    batch, states = batches[b], expected[f"b{b}.hidden"]  # of every so many positions of a row
    every = int(arrays["max_length"]) // states.shape[1]
    with torch.no_grad():
        hidden, logits = tiny.hidden_states(model, batch), model(batch)
    assert logits.shape == (batch.num_targets, expected[f"b{b}.n_logits"])
    place = 0
    for y in range(len(steps[b].rows)):
        length = int(arrays[f"b{b}.length"][y])
        sampled = hidden[place : place + length : every]
        assert_equal(sampled, states[y, : len(sampled)], f"hidden states, row {y}")
        place += length
    assert place == batch.num_tokens
    top = logits.topk(expected[f"b{b}.top_ids"].shape[1])
    assert top.indices.tolist() == expected[f"b{b}.top_ids"].tolist()
    assert_equal(top.values, expected[f"b{b}.top_logits"], "top logits")
    assert_equal(logits.logsumexp(-1), expected[f"b{b}.logsumexp"], "logsumexp")
    target = logits.gather(1, batch.targets[:, None])[:, 0]
    assert_equal(target, expected[f"b{b}.target_logits"], "target logits")
    loss = target_loss(logits, batch) / batch.num_targets
    assert_equal(loss, expected[f"b{b}.loss"], "loss")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(
    model: CPMBee, expected: Arrays, packed: dict[str, Packed], checkpointing: bool
) -> None:
    model.encoder.set_checkpointing(checkpointing)
    mean_loss(model, packed["packing"].batches[0]).backward()
    norms = {k.removeprefix("gradnorm."): v for k, v in expected.items() if "gradnorm." in k}
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(norms)
    for name, norm in norms.items():
        gradient = parameters[name].grad
        assert gradient is not None, name
        assert_equal(gradient.norm(), norm, f"gradient norm of {name}")
    gradient = model.position_bias.relative_attention_bias.grad
    assert_equal(gradient, expected["grad.position_bias"], "gradient of the bias table")


def test_delta_gradients(tuned: CPMBee, expected: Arrays, packed: dict[str, Packed]) -> None:
    mean_loss(tuned, packed["packing"].batches[0]).backward()
    gradients = {n: p.grad for n, p in tuned.named_parameters() if p.grad is not None}
    theirs = {k.removeprefix("lora_grad."): v for k, v in expected.items() if "lora_grad." in k}
    assert set(gradients) == set(theirs) and theirs
    for name, value in theirs.items():
        assert_equal(gradients[name], value, f"gradient of {name}")


@pytest.mark.parametrize("accumulate", [1, 3])
def test_delta_steps(
    tuned: CPMBee,
    expected: Arrays,
    packed: dict[str, Packed],
    vocabulary: Tokenizer,
    accumulate: int,
) -> None:
    """Through the engine; also where a step's records come in several micro-steps."""
    _, records, steps, batches = packed["packing"]
    engine = TorchEngine(torch.device("cpu"), torch.float32)
    engine.prepare(
        tuned,
        OptimizerSettings(
            weight_decay=0.01,
            clip_grad=1.0,
            loss_scale=2.0**20,  # of fp16 alone
            loss_scale_factor=2.0,
            loss_scale_steps=1024,
        ),
    )
    losses, norms = [], []
    for step in range(len(expected["lora_steps"])):
        b = step % len(batches)
        whole = batches[b]
        pairs = list(zip(whole.extension_ids.tolist(), whole.extension_subs.tolist(), strict=True))
        loss = 0.0
        for i in range(accumulate):
            share = [records[n] for n in steps[b].numbers[i::accumulate]]
            batch = collate(share, vocabulary, pairs)
            part = tuned.loss(batch) / whole.num_targets
            engine.backward(part)
            loss += part.item()
        result = engine.step(1e-3)
        assert not result.skipped
        losses.append(loss)
        norms.append(result.grad_norm)
    assert_equal(losses, expected["lora_steps"][:, 0], "losses")
    assert_equal(norms, expected["lora_steps"][:, 1], "gradient norms")
    assert min(norms) > 1.5  # every step was clipped


def test_losses_through_the_token_index(
    model: CPMBee,
    golden: Path,
    expected: Arrays,
    packed: dict[str, Packed],
    vocabulary: Tokenizer,
    tmp_path: Path,
) -> None:
    """The same losses by the way of training data: container, index, stream, sorted extension."""
    with DatasetWriter(tmp_path / "set", "data") as writer:
        for record in read_lines(golden / "packing_records.jsonl"):
            writer.write(record)
    index = TokenIndex.of(BinaryDataset(tmp_path / "set"), vocabulary)
    steps = best_fit(index.lengths.tolist(), *sizes_of(packed["packing"].arrays))
    for b in compared(expected, packed):
        numbers = steps[b].numbers
        pairs = index.extension_pairs(index.largest_subs(numbers))
        batch = make_batch(index.stream(numbers), vocabulary, pairs)
        assert batch.num_targets == int(index.num_targets[numbers].sum())
        with torch.no_grad():
            assert_equal(mean_loss(model, batch), expected[f"b{b}.loss"], f"loss of batch {b}")


def test_pruned_model(golden: Path, pack: Pack) -> None:
    expected = dict(np.load(golden / "pruned.npz"))
    sizes = sizes_of(dict(np.load(golden / "packing.npz")))  # its own file does not say
    model = CPMBee(ModelConfig.load(golden / "pruned_config.json"))
    assert sorted(model.state_dict()) == sorted(expected["names"].tolist())
    fill_weights(model, int(expected["seed"]))
    batch = pack(golden / "pruned_records.jsonl", *sizes)[2][0]
    with torch.no_grad():
        logits = model(batch)
    assert_equal(logits.logsumexp(-1), expected["logsumexp"], "logsumexp")
    target = logits.gather(1, batch.targets[:, None])[:, 0]
    assert_equal(target, expected["target_logits"], "target logits")
    assert_equal(target_loss(logits, batch) / batch.num_targets, expected["loss"], "loss")
