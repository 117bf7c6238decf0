"""Inputs led by coverage, with atheris: `PYTHONPATH=src:tests python -m fuzz.guided --seconds 30`.

Each reader in a process of its own, as atheris ends the process. It sees which branches of the
product an input takes; `fuzz.run` makes more inputs and better formed ones. Without atheris it says
so and ends well.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import subprocess
import sys
import tempfile
from pathlib import Path

_CORPUS = 50  # mutated files to begin with


def read_one(name: str, seconds: int) -> None:
    import atheris

    with atheris.instrument_imports(include=["cpm_bee", "data_reformat"]):
        from fuzz import run, targets

    with tempfile.TemporaryDirectory() as folder:
        work, corpus = Path(folder) / "work", Path(folder) / "corpus"
        work.mkdir()
        corpus.mkdir()
        with run.quiet():
            target = next(t for t in targets.make_targets(work) if t.name == name)
        rng = random.Random(0)
        for number in range(_CORPUS):
            (corpus / str(number)).write_bytes(target.make(rng))

        def read(content: bytes) -> None:
            with run.quiet():
                fault = run.find_fault(target, [content])
            if fault is not None:
                raise RuntimeError(fault)

        limits = [f"-max_total_time={seconds}", "-max_len=65536", "-rss_limit_mb=0", "-verbosity=0"]
        atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={folder}/", str(corpus)], read)
        atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seconds", type=int, default=30, help="for each reader")
    parser.add_argument("--target", help="only this one, in this process")
    options = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed (pip install -e '.[fuzz]'): no inputs led by coverage")
        return 0
    if options.target is not None:
        read_one(options.target, options.seconds)
        return 0
    from fuzz.run import target_names

    failed = []
    for name in target_names():
        command = [sys.executable, "-m", "fuzz.guided", "--target", name]
        print(f"{name}: led by coverage for {options.seconds} s", flush=True)
        if subprocess.run([*command, "--seconds", str(options.seconds)]).returncode:
            failed.append(name)
    print(f"faults in: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
