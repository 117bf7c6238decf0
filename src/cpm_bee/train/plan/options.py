"""The flags of plan.py: those of finetune_cpm_bee.py, and its own. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar

from cpm_bee import hints
from cpm_bee.cli import positive
from cpm_bee.options import Group
from cpm_bee.train.options import Options

PLAN = Group("plan", "计划")


@dataclass(frozen=True, kw_only=True)
class PlanOptions(Options):
    """The flags of plan.py."""

    script = "plan.py"
    description = (
        "What a run of finetune_cpm_bee.py with these flags will need: memory of each process, "
        "steps and time, disk, which GPUs it fits, and the smallest changes that make it fit. "
        "Measures a step of a few layers on this machine; writes nothing but what --json names."
    )
    chinese = (
        "按这些参数运行 finetune_cpm_bee.py 需要什么：每个进程的内存、步数与时间、磁盘、"
        "放得进哪些 GPU，以及放不下时最小的改动。会在本机实测几层模型的一步；"
        "除 `--json` 指定的文件外什么都不写。"
    )
    groups: ClassVar[tuple[Group, ...]] = (*Options.groups, PLAN)
    hints = hints.PLAN

    processes: int | None = PLAN.option(
        None,
        "plan for this many processes; WORLD_SIZE, or 1, when not given",
        "按这么多个进程来计划；不指定时为 WORLD_SIZE，没有则为 1",
        type=positive,
    )
    json: str | None = PLAN.option(
        None, "also write the plan as JSON", "同时把计划写成 JSON", metavar="FILE"
    )

    def of_run(self) -> Options:
        """The flags of the run that is planned, as a dry run."""
        values = {f.name: getattr(self, f.name) for f in fields(Options)}
        return replace(Options(**values), dry_run=True)
