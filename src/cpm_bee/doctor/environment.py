"""The environment, in seconds: collects the facts of this machine and judges them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from cpm_bee.doctor import rules
from cpm_bee.doctor.checkpoint import check_checkpoint
from cpm_bee.doctor.facts import Facts, collect
from cpm_bee.doctor.options import DoctorOptions
from cpm_bee.doctor.report import Finding


def examine(options: DoctorOptions) -> tuple[list[Finding], Facts]:
    """Returns the findings, and the facts that they are made from."""
    facts = collect(options.save)
    findings = rules.findings(facts)
    if options.load is not None and facts.torch:
        findings += check_checkpoint(options.load, options.model_config, options.vocab, facts)
    return findings, facts


def as_dict(facts: Facts) -> dict[str, Any]:
    return asdict(facts)
