"""The steps of `doctor.py --gpu`, cheapest first. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cpm_bee.doctor.report import NEEDS_CUDA, NEEDS_GPUS
from cpm_bee.errors import InputError

TOTAL_SECONDS = 600  # for all steps together


@dataclass(frozen=True)
class Step:
    """A check that runs in a process of its own.

    Attributes:
        seconds: its time limit.
        function: "module:function", called with a `Context`; see `child.py`.
        needs: the verdict where it cannot run at all; "" if it runs on any device.
        variables: added to its environment.
    """

    name: str
    title: str
    seconds: int
    function: str
    needs: str = ""
    variables: tuple[tuple[str, str], ...] = ()

    def unmet(self, device: str, cards: int) -> str:
        """The verdict if this step cannot run on a device; "" if it can."""
        if self.needs and device == "cpu":
            return NEEDS_CUDA
        if self.needs == NEEDS_GPUS and cards < 2:
            return NEEDS_GPUS
        return ""


@dataclass(frozen=True)
class TwoProcesses(Step):
    """A step with two processes: on two cards, or on a CPU with gloo."""

    def unmet(self, device: str, cards: int) -> str:
        return NEEDS_GPUS if device != "cpu" and cards < 2 else ""


_HERE = "cpm_bee.doctor"
# On a CPU, freed memory returns to the system at once, so that the peak is that of live memory.
_TRIM = (("MALLOC_TRIM_THRESHOLD_", "1000000"),)
STEPS: tuple[Step, ...] = (
    Step("sdpa", "attention kernels against their formula", 90, f"{_HERE}.attention:sdpa"),
    Step("fp32", "loss, gradients and three steps in fp32", 60, f"{_HERE}.training:fp32"),
    Step("bf16", "the same in bf16", 60, f"{_HERE}.training:bf16"),
    Step("fp16", "the same in fp16, and a forced overflow", 60, f"{_HERE}.training:fp16"),
    Step("checkpointing", "recomputed activations", 60, f"{_HERE}.training:checkpointing"),
    Step("prefetch", "copies in the background, bit for bit", 60, f"{_HERE}.copies:prefetching"),
    Step("quantize", "bases in 4 and 8 bit", 90, f"{_HERE}.quantization:quantize"),
    Step("generation", "logits and answers", 60, f"{_HERE}.generation:generation"),
    Step("flex", "FlexAttention on ragged batches", 150, f"{_HERE}.compilers:flex", NEEDS_CUDA),
    Step("compile", "torch.compile", 120, f"{_HERE}.compilers:compiled"),
    Step(
        "memory",
        "a layer of the 10B: memory, predicted and measured",
        90,
        f"{_HERE}.memory:layer",
        variables=_TRIM,
    ),
    TwoProcesses("nccl", "two processes exchange tensors", 60, f"{_HERE}.processes:exchange"),
    TwoProcesses("ddp", "two processes, each with the model", 90, f"{_HERE}.processes:ddp"),
    TwoProcesses("fsdp", "two processes, each with a part", 120, f"{_HERE}.processes:fsdp"),
    TwoProcesses("resume", "one process, then two, then one", 120, f"{_HERE}.processes:resume"),
    TwoProcesses("kill", "a process that is killed is named", 120, f"{_HERE}.processes:kill"),
    Step("bmtrain", "the bmtrain engine", 120, f"{_HERE}.processes:bmtrain", NEEDS_CUDA),
)


def choose(names: Sequence[str] | None) -> list[Step]:
    """Returns the steps of these names, or all, in the order in which they run.

    Raises:
        InputError: a name is unknown.
    """
    known = {step.name for step in STEPS}
    unknown = [name for name in names or () if name not in known]
    if unknown or (names is not None and not names):
        raise InputError(
            f"--steps {','.join(names or ())}: no such step; choose from "
            f"{', '.join(step.name for step in STEPS)}"
        )
    return [step for step in STEPS if names is None or step.name in names]
