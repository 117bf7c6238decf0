"""One file of answers by several processes: each answers its share, the first one joins them.

The records are cut into as many runs of neighbours as there are processes, of about equal length of
text. A process writes its run as `resumable_file` writes a whole one, under the name
`OUTPUT.rank-R-of-N`: while it works there are `OUTPUT.rank-R-of-N.partial` and its settings. All
wait until the last one is done; then rank 0 writes OUTPUT, which appears whole, and the shares are
removed. So a kill at any moment leaves every share as far as it got, and `--resume` with the same
number of processes goes on in each.

A record keeps its number in the input, by which its samples are drawn: the answers are those of one
process, byte for byte.

What the processes have to agree on goes through the store of the process group, on a GPU too, where
they otherwise have nothing to say to each other.
"""

from __future__ import annotations

import json
import shlex
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch

from cpm_bee.data.record_file import STANDARD
from cpm_bee.data.record_source import LocatedRecord
from cpm_bee.distributed import process_group
from cpm_bee.distributed.rank import RankInfo
from cpm_bee.errors import InputError
from cpm_bee.files import atomic_file
from cpm_bee.generate.generator import Generator
from cpm_bee.generate.jsonl import (
    FileOptions,
    Score,
    check_resume,
    check_vocabulary,
    generate_file,
)
from cpm_bee.generate.output import names_in_use


def check_names(input_name: str, output: str) -> None:
    """Raise `InputError` where several processes would read or write one pipe."""
    for flag, name in (("--input", input_name), ("--output", output)):
        kind = "standard input" if flag == "--input" else "standard output"
        if name == STANDARD:
            raise InputError(f"{flag} -: several processes cannot share {kind}; give a file")
    if Path(output).exists() and not Path(output).is_file():
        raise InputError(f"--output {output}: several processes need a file, this is none")


def cuts(records: Sequence[LocatedRecord], parts: int) -> list[int]:
    """Where `parts` runs of records begin and end, [parts + 1]; all have about as much text."""
    sizes = [len(json.dumps(one.given, ensure_ascii=False)) for one in records]
    ends = list(accumulate(sizes))
    inner = [bisect_left(ends, ends[-1] * i / parts) + 1 for i in range(1, parts)]
    return [0, *(min(cut, len(records)) for cut in inner), len(records)]


def check_shares(output: str, inputs: Sequence[LocatedRecord], *, resume: bool) -> None:
    """Raise `InputError` for what an interrupted start has left, in any share.

    Every process looks at all shares, so that all of them find the same, and none of them may be
    writing yet: `generate_shared` begins when all have looked.
    """
    size = RankInfo.of_this_process().world_size
    places = cuts(inputs, size)
    for rank in range(size):
        own = inputs[places[rank] : places[rank + 1]]
        check_resume(_share_name(output, rank, size), own, resume=resume)


def refuse_other_shares(output: str, size: int) -> None:
    """Raise `InputError` if a run with another number of processes has left answers for `output`.

    Also for one process (`size` is 1), whose own file has no number in its name.
    """
    if output == STANDARD:
        return
    whole = names_in_use(Path(output))
    own = {names_in_use(Path(_share_name(output, r, size))).partial for r in range(size)}
    found = sorted(whole.output.parent.glob(f"{_escaped(whole.output.name)}.rank-*-of-*.partial"))
    if size > 1 and whole.partial.exists():
        found.append(whole.partial)
    for path in found:
        if path not in own and path.stat().st_size:
            count = path.name.removesuffix(".partial").rpartition("-of-")[2]
            processes = count if count.isdigit() else "1"
            raise InputError(
                f"{path}: holds records of an interrupted generation with {processes} "
                f"process{'' if processes == '1' else 'es'}, this is one with {size}\n"
                f"to go on after them, give --resume and as many processes; to begin anew: "
                f"rm {shlex.quote(str(whole.output))}.*partial*"
            )


def generate_shared(
    generator: Generator,
    inputs: Sequence[LocatedRecord],
    output: str,
    options: FileOptions,
) -> Score:
    """`generate_file` for all processes of this run; the score is of all records.

    Raises:
        RunError: another process has failed or was killed.
    """
    info = RankInfo.of_this_process()
    # All records in all processes: whoever fails has the same error as the first one.
    check_vocabulary(inputs, generator.encoder)
    process_group.join(torch.device("cpu"))
    try:
        process_group.wait_for_all("checked")
        begins = cuts(inputs, info.world_size)
        own = slice(begins[info.rank], begins[info.rank + 1])
        name = _share_name(output, info.rank, info.world_size)

        def join_shares() -> None:
            process_group.wait_for_all("answered")
            if info.rank == 0:
                _join(output, info.world_size)
            process_group.wait_for_all("joined")

        generate_file(
            generator,
            inputs[own],
            name,
            options,
            first_number=begins[info.rank],
            at_end=join_shares,
        )
        Path(name).unlink()
        return _score(output, inputs) if info.rank == 0 else Score()
    finally:
        process_group.leave()


def _share_name(output: str, rank: int, size: int) -> str:
    path = names_in_use(Path(output)).output
    return str(path.with_name(f"{path.name}.rank-{rank}-of-{size}"))


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _join(output: str, size: int) -> None:
    """Write all shares, in order, to the output; each is whole, but under its unfinished name."""
    with atomic_file(output) as file:
        for rank in range(size):
            partial = names_in_use(Path(_share_name(output, rank, size))).partial
            with open(partial, encoding="utf-8") as share:
                file.writelines(share)


def _score(output: str, inputs: Sequence[LocatedRecord]) -> Score:
    score = Score()
    with open(output, encoding="utf-8") as file:
        for line, one in zip(file, inputs, strict=True):
            score = score.counted(one.given, json.loads(line))
    return score
