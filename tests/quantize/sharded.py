"""Run under torchrun: a quantized model in shards against the same model whole, on each rank."""

from __future__ import annotations

from typing import Any

import tiny
import torch
import torch.distributed as dist
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from cpm_bee import delta
from cpm_bee.data.batch import collate
from cpm_bee.distributed import process_group
from cpm_bee.model.network import CPMBee
from cpm_bee.quantize.formats import FORMATS
from cpm_bee.quantize.linear import quantize_

RECORDS = [{"input": "春天 ab" * 3, "<ans>": "天"}, {"input": "x", "<ans>": {"a": "b", "x": ""}}]


def make(kind: str, checkpointing: bool) -> CPMBee:
    model = tiny.make_model(3, dim_model=64, num_heads=4, dim_head=16, dim_ff=128)
    quantize_(model, FORMATS[kind])
    delta.insert(model, delta.DeltaConfig(rank=2), 0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):  # else A would have no gradient
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    model.encoder.set_checkpointing(checkpointing)
    return model


def shard(model: CPMBee, dtype: torch.dtype | None) -> None:
    policy = MixedPrecisionPolicy(param_dtype=dtype)
    for layer in model.encoder.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    register_fsdp_forward_method(model, "loss")


def gradients(model: CPMBee) -> tuple[float, dict[str, torch.Tensor]]:
    batch = collate(tiny.encode(RECORDS), tiny.TOKENIZER)
    loss = model.loss(batch)
    loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            found[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return loss.item(), found


def main() -> None:
    dist.init_process_group("gloo")
    for kind in FORMATS:
        for checkpointing in (False, True):
            whole, parts = make(kind, checkpointing), make(kind, checkpointing)
            shard(parts, None)
            query = parts.get_submodule("encoder.layers.0.self_att.self_attention.project_q")
            codes: Any = query.codes
            local = codes.to_local()
            assert local.dtype == FORMATS[kind].codes_dtype and len(local) == 32, local.shape
            expected, found = gradients(whole), gradients(parts)
            assert abs(found[0] - expected[0]) < 1e-5 * abs(expected[0]), (found[0], expected[0])
            assert expected[1] and found[1].keys() == expected[1].keys()
            for name, gradient in expected[1].items():
                torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5)
    # Mixed precision casts absmax, not the codes.
    parts = make("nf4", False)
    shard(parts, torch.bfloat16)
    found, expected = gradients(parts), gradients(make("nf4", False))
    assert abs(found[0] - expected[0]) < 0.02 * abs(expected[0]), (found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    dist.barrier()
    if dist.get_rank() == 0:
        print("all equal")
    process_group.leave()


if __name__ == "__main__":
    main()
