"""How a model is spread over the processes of the torch engine."""

from __future__ import annotations

from cpm_bee.engine import Engine
from cpm_bee.engine.torch_engine import TorchEngine
from cpm_bee.pretrained import PretrainedModel
from cpm_bee.train import memory_estimate
from cpm_bee.train.options import AUTO, DDP, FSDP

# Of what a process can have: the rest is for activations.
_SHARE = 0.5
# A trained fp32 value has a gradient and two moments beside it.
_TRAINED = 4


def distribute(wanted: str, offload: bool, engine: Engine, pretrained: PretrainedModel) -> str:
    """Fill the model of `open_pretrained`, or have the engine do so in parts; collective.

    Args:
        wanted: auto, ddp or fsdp; auto shards a model that, with its gradients and moments, takes
            more than half of the memory that a process can have.

    Returns:
        What was done and why, for people.
    """
    if not isinstance(engine, TorchEngine):
        pretrained.materialize_mapped()
        return "ZeRO-3 by bmtrain, each process with a part of every tensor"
    if engine.world_size == 1:
        pretrained.materialize(engine.device)
        return "one process, with the whole model"
    kind, reason = wanted, "as asked"
    if wanted == AUTO:
        kind, reason = _choose(engine, pretrained)
    if kind == FSDP:
        engine.shard(pretrained.tensors, offload=offload)
        location = ", in host memory" if offload else ""
        return f"parallel fsdp, each process with a part of every tensor{location}: {reason}"
    pretrained.materialize(engine.device)
    return f"parallel ddp, each process with the whole model: {reason}"


def _choose(engine: Engine, pretrained: PretrainedModel) -> tuple[str, str]:
    needed = sum(
        p.nbytes * (_TRAINED if p.requires_grad else 1) for p in pretrained.model.parameters()
    )
    available = memory_estimate.free_memory(engine.device, engine.world_size)
    sizes = (
        f"{needed / 2**30:.2f} GiB of weights and optimizer state, {available / 2**30:.2f} GiB free"
    )
    own = needed > _SHARE * available
    if engine.reduce_max([int(own)])[0]:
        return FSDP, sizes if own else "another process has less memory"
    return DDP, sizes
