"""What a run will need, as figures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cpm_bee.train.plan.changes import Fix
from cpm_bee.train.plan.disk import DiskUse
from cpm_bee.train.plan.measurement import Measured
from cpm_bee.train.plan.simulation import Peaks as Held
from cpm_bee.train.plan.times import RunTime


@dataclass(frozen=True)
class Card:
    """A GPU of so many GB: the predicted peak if the run fits it, else what makes it fit."""

    gigabytes: int
    peak: int | None
    fixes: list[Fix]


@dataclass(frozen=True)
class RunPlan:
    """What a run will need. Sizes in bytes, of each process; times in seconds.

    Attributes:
        host: the tensors of a run on the CPU; None on a GPU.
        gpu: the tensors of a run on a GPU, in 16 bit.
        host_peak: resident memory of a process, at its peak.
        steps: of the whole run, about.
    """

    host: Held | None
    gpu: Held
    measured: Measured
    host_peak: int
    processes: int
    steps: int
    step_tokens: float
    evaluation_tokens: float
    time: RunTime | None
    disk: DiskUse
    cards: list[Card]

    def as_json(self) -> dict[str, Any]:
        values = asdict(self)
        for name in ("disk", "time"):
            part = getattr(self, name)
            values[name] = None if part is None else part._asdict()
        if self.time is not None:
            values["time"]["total"] = self.time.total
        values["disk"]["results"] = self.disk.results
        for name in ("host", "gpu"):
            held = getattr(self, name)
            if held is not None:
                values[name] |= {"peak": held.peak, "worst": held.worst, "rest": held.rest}
        return values
