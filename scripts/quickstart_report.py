"""The last steps of quickstart.sh: three answers, an evaluation against the base, file paths."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

SRC = Path(__file__).resolve().parent.parent / "src"
SHOWN = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", type=Path, required=True, help="folder of the run")
    parser.add_argument("--save-name", required=True, help="name of the run")
    parser.add_argument("--records", type=Path, required=True, help="evaluation records")
    arguments = parser.parse_args()
    start = arguments.save / arguments.save_name
    events = read_log(Path(f"{start}-log.jsonl"))
    delta = Path(f"{start}-delta-best.pt")
    sample, answers = Path(f"{start}-sample.jsonl"), Path(f"{start}-answers.jsonl")
    expected = take(arguments.records, sample)
    generate(events[0]["options"], delta, sample, answers)
    written = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    for answer, record in zip(expected, written, strict=True):
        print()
        for key, value in record.items():
            print(f"  {key}: {json.dumps(value, ensure_ascii=False)}")
        verdict = "correct" if answer == record["<ans>"] else f"expected {json.dumps(answer)}"
        print(f"  -> {verdict}")
    evaluate(events[0]["options"], delta)
    evaluations = [e for e in events if e["event"] == "eval"]
    best = min(evaluations, key=lambda e: e["loss"])
    print(f"\naccuracy on {best['records']} evaluation records (exact match):")
    print(f"  before tuning  {evaluations[0]['exact_match']:.1%}")
    print(f"  after tuning   {best['exact_match']:.1%}  (best loss, after {best['step']} steps)")
    print("\nfiles:")
    for name, path in (("tuned delta", delta), ("log", f"{start}-log.jsonl"), ("answers", answers)):
        print(f"  {name:12} {path}")


def read_log(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def take(records: Path, sample: Path) -> list:
    """Copy the first records to `sample`; returns their answers."""
    with open(records, encoding="utf-8") as file:
        lines = [line for line, _ in zip(file, range(SHOWN), strict=False)]
    sample.write_text("".join(lines), encoding="utf-8")
    return [json.loads(line)["<ans>"] for line in lines]


def generate(options: dict, delta: Path, sample: Path, answers: Path) -> None:
    run("text_generation.py", options, delta, "--input", str(sample), "--output", str(answers))


def evaluate(options: dict, delta: Path) -> None:
    print("\n== 5/5 evaluate.py: how good it is, how sure that is, and whether the delta helps")
    run("evaluate.py", options, delta, "--dataset", options["eval_dataset"], "--baseline")


def run(script: str, options: dict, delta: Path, *flags: str) -> None:
    """Run a script with the model of the run; ends this one if it fails."""
    command = [sys.executable, str(SRC / script), "--load", options["load"]]
    command += ["--model-config", options["model_config"], "--delta", str(delta), *flags]
    if options["vocab"] is not None:
        command += ["--vocab", options["vocab"]]
    print(" ".join(command), flush=True)
    if subprocess.run(command).returncode:
        sys.exit(f"error: {script} failed, see above")


if __name__ == "__main__":
    main()
