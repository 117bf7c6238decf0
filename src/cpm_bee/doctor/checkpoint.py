"""Whether a checkpoint, its config and its vocabulary fit together, and fit into this machine."""

from __future__ import annotations

from collections.abc import Iterator

from cpm_bee.doctor.facts import Facts
from cpm_bee.doctor.gpu_rules import GIB
from cpm_bee.doctor.report import FAULT, OK, WARNING, Finding
from cpm_bee.errors import InputError, describe

# A state holds each trained tensor with two moments in fp32; that of a LoRA is small beside this.
_ROOM_FOR_STATES = GIB


def check_checkpoint(
    load: str, model_config: str, vocab: str | None, facts: Facts
) -> Iterator[Finding]:
    """Check what a run would check before it reads any values."""
    import torch

    from cpm_bee.pretrained import open_pretrained

    try:
        pretrained = open_pretrained(load, model_config, vocab, torch.bfloat16)
    except (InputError, OSError) as error:
        yield Finding("checkpoint", FAULT, describe(error))
        return
    config, parameters = pretrained.model.config, list(pretrained.model.parameters())
    count = sum(p.numel() for p in parameters)
    size = sum(p.nbytes for p in parameters)
    yield Finding(
        "checkpoint",
        OK,
        f"{load}: {config.num_layers} layers, {count:,} parameters, {size / GIB:.2f} GiB in 16 bit",
    )
    yield Finding("vocabulary", OK, f"{len(pretrained.tokenizer):,} tokens, as many as the model")
    devices = facts.torch.get("devices", [])
    room = min((d["free"] for d in devices), default=facts.memory)
    where = "on the card" if devices else "of memory"
    if size > room:
        text = f"{size / GIB:.1f} GiB in 16 bit, {room / GIB:.1f} GiB {where} free"
        fix = "--quantize nf4 takes about a quarter; --parallel fsdp divides it between cards"
        yield Finding("size", WARNING, text, fix)
    free = facts.save.get("free", 0)
    if free < size + _ROOM_FOR_STATES:
        text = (
            f"{free / GIB:.1f} GiB free: enough for deltas, not for full fine-tuning, which saves "
            f"the model ({size / GIB:.1f} GiB in 16 bit) several times"
        )
        yield Finding("disk of --save", WARNING, text, "choose another folder with --save")
