"""What all ranks of a run must have alike: data and vocabulary, the first delta, the step.

Ranks that differ would wait for each other forever, or add up gradients of different weights.
"""

from __future__ import annotations

from cpm_bee.data.bin_dataset import BinaryDataset
from cpm_bee.data.mixture import MixedIndex, Mixture
from cpm_bee.data.token_index.reader import TokenIndex
from cpm_bee.engine import Engine
from cpm_bee.errors import CpmBeeError, InputError
from cpm_bee.tokenizer import Tokenizer
from cpm_bee.train.initial_delta import begins_with_file, digest_of
from cpm_bee.train.options import Options


def open_data(
    engine: Engine, data: BinaryDataset | Mixture, tokenizer: Tokenizer
) -> TokenIndex | MixedIndex:
    """Open the token index of a dataset, or those of a mixture; collective (see `open_index`)."""
    if isinstance(data, Mixture):
        return MixedIndex(data, [open_index(engine, d, tokenizer) for d in data.datasets])
    return open_index(engine, data, tokenizer)


def open_index(engine: Engine, dataset: BinaryDataset, tokenizer: Tokenizer) -> TokenIndex:
    """Open the token index, which rank 0 makes if necessary; collective.

    Raises:
        InputError: on all ranks, if it cannot be made, or if ranks have different data or
            vocabularies: each plans for itself, and they would wait for each other forever.
    """
    failure: Exception | None = None
    if engine.rank == 0:
        try:
            TokenIndex.of(dataset, tokenizer, refuse_busy=True)
        except (CpmBeeError, OSError) as error:
            failure = error
    if engine.reduce([float(failure is not None)])[0]:
        raise failure or InputError(f"{dataset.folder}: the first process cannot read it")
    own = int(dataset.fingerprint[:15], 16) ^ int(tokenizer.fingerprint[:15], 16)
    if not _is_same_on_all_ranks(engine, own):
        raise InputError(
            f"{dataset.folder}: the processes have different data or vocabularies; copy the folder "
            "and the vocabulary to all machines again"
        )
    return TokenIndex.of(dataset, tokenizer)


def check_same_step(engine: Engine, step: int) -> None:
    """Check that all processes resume from the same state, or none does; collective.

    Each has looked for it on its own.

    Args:
        step: of the state; -1 if this process begins anew.
    """
    largest, least = engine.reduce_max([step, -step])
    if largest != -least:
        found = ["no state" if s < 0 else f"the state of step {s}" for s in (-least, largest)]
        raise InputError(
            f"--resume: one process finds {found[0]}, another one {found[1]}; --save must be on a "
            "file system that all machines share"
        )


def refuse_different_deltas(engine: Engine, options: Options) -> None:
    """Raise `InputError`, on all ranks, if they begin with different deltas; collective."""
    if options.init_delta is None or not begins_with_file(options):
        return
    if not _is_same_on_all_ranks(engine, digest_of(options.init_delta)):
        raise InputError(
            f"--init-delta {options.init_delta}: the processes have different files; copy it to "
            "all machines again"
        )


def _is_same_on_all_ranks(engine: Engine, number: int) -> bool:
    largest, least = engine.reduce_max([number, -number])
    return largest == -least
