"""Check this machine: see `python doctor.py --help` and docs/scripts.md."""

from __future__ import annotations

import json
import shlex
import sys
import time
from typing import Any

from cpm_bee.cli import run_command
from cpm_bee.language import said


def main() -> int:
    if sys.argv[1:2] != ["explain"]:
        return examine_machine()
    from cpm_bee.doctor.explain import explain

    print(explain(sys.argv[2:]))
    return 0


def examine_machine() -> int:
    # Imported late, so that `explain` works where packages are missing.
    from cpm_bee.doctor import report, steps
    from cpm_bee.doctor.environment import as_dict, examine
    from cpm_bee.doctor.options import DoctorOptions
    from cpm_bee.doctor.runner import run_steps
    from cpm_bee.files import atomic_file

    options = DoctorOptions.parse()
    chosen = steps.choose(options.steps)
    if options.list:
        print("\n".join(f"{step.name:<14} {said(step.title)}" for step in chosen))
        return 0
    findings, facts = examine(options)
    if options.gpu and options.device != "cpu" and not facts.torch.get("devices"):
        fix = "see the lines above; --device cpu runs what can run there"
        findings.append(report.Finding("--gpu", report.FAULT, "PyTorch finds no GPU", fix))
        chosen = []
    print(report.table(findings), flush=True)
    found: dict[str, Any] = {"command": shlex.join(sys.argv), "date": time.strftime("%F %T %z")}
    found["facts"] = as_dict(facts)
    if options.gpu and chosen:
        begin = said(f"{len(chosen)} steps on {options.device}, each in a process of its own")
        print(f"\n{begin}", flush=True)
        results = run_steps(chosen, options.device, len(facts.torch.get("devices", [])))
        shown = [result.finding(said) for result in results]
        print(f"\n{report.table(shown, translate_names=False)}")
        findings += [result.finding() for result in results]
        found["steps"] = [result.as_json() for result in results]
    print(f"\n{report.summary(findings)}")
    if options.json is not None:
        with atomic_file(options.json) as file:
            json.dump(report.as_json(findings, **found), file, ensure_ascii=False, indent=1)
        print(said(f"written: {options.json}"))
    return report.exit_status(findings)


if __name__ == "__main__":
    run_command(main)
