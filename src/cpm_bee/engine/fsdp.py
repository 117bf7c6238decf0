"""FSDP2: every process holds a part of each tensor. Imported only where it is used.

PyTorch gathers the tensors of a layer when its forward or backward pass begins, and frees the
parts of other processes when it ends.

In full fine-tuning the parts are fp32, and a layer is gathered in the compute type: it is sent and
held at half the size, and autocast finds nothing to cast. (A cast would stay in autocast's cache,
with 2 bytes for each parameter, until the pass ends.) The products are the same as with fp32
weights, as autocast rounds them in the same way. Only the layers' norm weights are rounded in
addition, and their gradients on each process before the sum, which is in fp32. The tensors outside
the layers are gathered in fp32: the embedding begins the residual stream, which stays fp32.

Under a delta, tensors are gathered in the type that they are held in: the base in the compute
type, LoRA in fp32, a quantized base as codes and fp32 scales.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from cpm_bee.checkpoint.loading import copy_values
from cpm_bee.checkpoint.reader import LazyTensor
from cpm_bee.distributed.process_group import exchange
from cpm_bee.engine.parallel_strategy import ParallelStrategy
from cpm_bee.model.network import CPMBee
from cpm_bee.pretrained import Tensors
from cpm_bee.progress import progress_bar

# The methods of the model that start a pass, besides `forward`.
_PASSES = ("loss", "score")


class FSDPStrategy(ParallelStrategy):
    """Every process holds some rows of each tensor, which is sharded along its first dimension.

    Args:
        tensors: the values of the model's tensors on the meta device; a process reads only the
            rows that it keeps.
        dtype: the compute type.
        offload: keep all parts in host memory, and copy them to the device layer by layer.
    """

    lockstep = True

    def __init__(
        self,
        device: torch.device,
        world_size: int,
        tensors: Tensors,
        *,
        dtype: torch.dtype,
        offload: bool,
    ) -> None:
        self._device = device
        self._tensors = tensors
        self._dtype = dtype
        self._offload = offload
        self._mesh = init_device_mesh(device.type, (world_size,))

    def distribute(self, model: CPMBee) -> None:
        """Shard all tensors of a model, and read the parts that this process holds.

        Tensors on the meta device get their values from `tensors`. The others, which must be the
        same on all processes and are small (a LoRA's), keep their own.
        """
        own = _to_meta(model)
        for layer in model.encoder.layers:
            in_full = all(p.requires_grad for p in layer.parameters())
            self._shard(layer, self._dtype if in_full else None)
        self._shard(model, None)
        for name in _PASSES:
            register_fsdp_forward_method(model, name)
        model.to_empty(device="cpu" if self._offload else self._device)
        parameters = dict(model.named_parameters())
        total = sum(self.local(p).nbytes for p in parameters.values())
        quiet = dist.get_rank() > 0
        with progress_bar(
            total=total, description="loading", unit="B", quiet=quiet, delay=2
        ) as bar:
            for name, tensor in own.items():
                self._read_rows(parameters[name], LazyTensor.of(tensor))
            for name, entry in self._tensors():
                bar.update(self._read_rows(parameters[name], entry))

    def _shard(self, module: nn.Module, gathered: torch.dtype | None) -> None:
        """Shard what is not sharded yet; `gathered` is the type to gather in, None for its own."""
        pin = self._device.type == "cuda"
        fully_shard(
            module,
            mesh=self._mesh,
            mp_policy=MixedPrecisionPolicy(
                param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
            offload_policy=CPUOffloadPolicy(pin_memory=pin) if self._offload else OffloadPolicy(),
        )
        assert isinstance(module, FSDPModule)
        # Gradients are summed, not averaged: each is a share of the step's mean loss.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)

    def _read_rows(self, parameter: torch.Tensor, entry: LazyTensor) -> int:
        """Read this process's rows; returns the number of bytes."""
        local = self.local(parameter)
        begin = _first_row(parameter)
        copy_values(local, entry.rows(begin, begin + len(local)).read())
        return local.nbytes

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return _dtensor(tensor).to_local()

    def whole(self, local: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        d = _dtensor(like)
        parts = DTensor.from_local(
            local.detach().to(self._device),
            d.device_mesh,
            d.placements,
            run_check=False,
            shape=d.shape,
            stride=d.stride(),
        )
        with exchange():
            full = parts.full_tensor()
        return full.to("cpu", copy=True) if dist.get_rank() == 0 else full.new_empty(0).cpu()

    def part_of(self, whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        begin = _first_row(like)
        return whole[begin : begin + len(self.local(like))]

    def sum_gradients(self, gradients: Sequence[torch.Tensor]) -> None:
        """Does nothing: PyTorch sums the gradients in the backward pass."""

    def sum_of_parts(self, value: torch.Tensor) -> torch.Tensor:
        total = value.to(self._device)
        with exchange():
            dist.all_reduce(total)
        return total


def _dtensor(tensor: torch.Tensor) -> DTensor:
    assert isinstance(tensor, DTensor)
    return tensor


def _first_row(parameter: torch.Tensor) -> int:
    d = _dtensor(parameter)
    _, offset = compute_local_shape_and_global_offset(d.shape, d.device_mesh, d.placements)
    return int(offset[0])


def _to_meta(model: nn.Module) -> dict[str, torch.Tensor]:
    """Move a whole model to the meta device; returns the values that it had, by name."""
    own = {name: p.detach() for name, p in model.named_parameters() if not p.is_meta}
    model.to("meta")
    return own
