"""Give every reader mutated files: `PYTHONPATH=src:tests python -m fuzz.run --inputs 20000`.

Each input ends in a result or in an error of our own, within limits of time and memory (see
`fuzz.limits`). Everything else is reported with the command that repeats it; exit status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import support
import torch

sys.path.insert(0, str(support.ROOT / "tutorials" / "basic_task_finetune"))

from fuzz.limits import HangError, MemoryUseError, limit_address_space, limits
from fuzz.targets import EXPECTED, Target, make_targets

SECONDS = 20.0  # for one input, also on a busy machine
MAX_FAULTS = 20
INPUTS_VARIABLE, SEED_VARIABLE = "FUZZ_INPUTS", "FUZZ_SEED"


def check(target: Target, inputs: list[bytes]) -> str | None:
    """Read inputs; what is wrong, or None."""
    try:
        with limits(sum(map(len, inputs)), SECONDS):
            target.read(inputs)
    except EXPECTED:
        return None
    except (Exception, HangError, MemoryUseError):
        return traceback.format_exc()
    return None


def find_fault(target: Target, inputs: list[bytes]) -> str | None:
    """What is wrong with a batch: the first input that is wrong by itself, or all of them."""
    reason = check(target, inputs)
    if reason is None or len(inputs) == 1:
        return reason and f"input {inputs[0][:300]!r}\n{reason}"
    for content in inputs:
        alone = check(target, [content])
        if alone is not None:
            return f"input {content[:300]!r}\n{alone}"
    return f"of {len(inputs)} inputs together\n{reason}"


def fuzz(target: Target, seed: int, count: int, batches: range | None, status: int) -> list[str]:
    """Read `count` inputs of a target, or some of its batches; the faults."""
    faults: list[str] = []
    for batch in batches or range(-(-count // target.batch)):
        # Whatever ends the process, this says which batch it was.
        repeat = f"--target {target.name} --seed {seed} --batch {batch}"
        os.pwrite(status, f"{repeat}\n".ljust(99).encode(), 0)
        rng = random.Random(f"{seed}:{target.name}:{batch}")
        size = target.batch if batches else min(target.batch, count - batch * target.batch)
        fault = find_fault(target, [target.make(rng) for _ in range(size)])
        if fault is not None:
            faults.append(f"python -m fuzz.run {repeat}\n{fault}")
            print(f"\n{faults[-1]}", file=sys.__stdout__, flush=True)
            if len(faults) == MAX_FAULTS:
                break
    return faults


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what the product prints; as strict about its text as a terminal is."""
    warnings.simplefilter("ignore")
    with (
        open(os.devnull, "w", encoding="utf-8") as out,
        open(os.devnull, "w", encoding="utf-8", errors="backslashreplace") as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        yield


def target_names() -> list[str]:
    with tempfile.TemporaryDirectory() as folder, quiet():
        return [target.name for target in make_targets(Path(folder))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    default_inputs = int(os.environ.get(INPUTS_VARIABLE, "20000"))
    default_seed = int(os.environ.get(SEED_VARIABLE, random.SystemRandom().randrange(10**9)))
    parser.add_argument("--inputs", type=int, default=default_inputs, help="over all targets")
    parser.add_argument("--seed", type=int, default=default_seed)
    parser.add_argument("--target", help="only this one")
    parser.add_argument("--batch", type=int, help="only this batch")
    parser.add_argument("--status", default=os.devnull, help="file that names the present batch")
    options = parser.parse_args()
    print(f"{options.inputs:,} inputs, seed {options.seed}", flush=True)
    torch.set_num_threads(1)
    os.fsync = lambda fd: None  # nothing here need outlive a power cut
    batches = None if options.batch is None else range(options.batch, options.batch + 1)
    status = os.open(options.status, os.O_WRONLY | os.O_CREAT, 0o666)
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        with quiet():
            targets = make_targets(Path(folder))
        limit_address_space()
        chosen = [t for t in targets if options.target in (None, t.name)]
        if not chosen:
            parser.error(f"--target is one of {', '.join(t.name for t in targets)}")
        total = sum(t.share for t in chosen)
        for target in chosen:
            count = -(-options.inputs * target.share // total)
            begin = time.perf_counter()
            with quiet():
                found = fuzz(target, options.seed, count, batches, status)
            seconds = time.perf_counter() - begin
            outcome = f"{count:,} inputs, {seconds:.1f} s, {len(found)} faults"
            print(f"{target.name}: {outcome}", flush=True)
            faults += found
    os.close(status)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
