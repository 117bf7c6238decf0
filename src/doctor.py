"""Check this machine: see `python doctor.py --help` and docs/scripts.md."""

from __future__ import annotations

import json
import shlex
import sys

from cpm_bee.cli import run_command
from cpm_bee.doctor.options import DoctorOptions
from cpm_bee.files import atomic_file


def main() -> int:
    options = DoctorOptions.parse()
    if options.list or options.gpu:
        from cpm_bee.doctor import steps

        chosen = steps.choose(options.steps)
        if options.list:
            print("\n".join(f"{step.name:<14} {step.title}" for step in chosen))
            return 0
    from cpm_bee.doctor import report
    from cpm_bee.doctor.environment import examine, facts_for_report

    findings, facts = examine(options)
    print(report.table(findings), flush=True)
    found = report.as_json(findings, command=shlex.join(sys.argv), facts=facts_for_report(facts))
    if options.gpu:
        from cpm_bee.doctor.runner import run_steps

        print(f"\n{len(chosen)} steps on {options.device}, each in a process of its own", flush=True)
        results = run_steps(chosen, options.device, facts.torch.get("devices", []))
        steps_found = [result.finding() for result in results]
        print(f"\n{report.table(steps_found)}")
        findings += steps_found
        found["steps"] = [result.as_json() for result in results]
    print(f"\n{report.summary(findings)}")
    if options.json is not None:
        with atomic_file(options.json) as file:
            json.dump(found, file, ensure_ascii=False, indent=1)
        print(f"written: {options.json}")
    return report.exit_status(findings)


if __name__ == "__main__":
    run_command(main)
