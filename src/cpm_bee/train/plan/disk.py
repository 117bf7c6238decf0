"""The files that a run will write, and their sizes."""

from __future__ import annotations

from typing import NamedTuple

from cpm_bee import quantize
from cpm_bee.checkpoint.reader import Checkpoint
from cpm_bee.disk import free_space
from cpm_bee.quantize.cache import cache_path
from cpm_bee.quantize.formats import FORMATS
from cpm_bee.train.checks import Inputs
from cpm_bee.train.options import Options

_INDEX_TOKEN, _INDEX_RECORD = 8, 34  # bytes of a token index


class DiskUse(NamedTuple):
    """Numbers of bytes.

    Attributes:
        weights: best and last.
        states: the saved states that are kept, at most.
        replaced: a file beside the one that it replaces, until it is whole.
        quantized: the quantized base beside the checkpoint; 0 if it is there, or not used.
        token_index: the token indexes beside the datasets that have none yet.
        free: what is free where the results go.
    """

    weights: int
    states: int
    replaced: int
    quantized: int
    token_index: int
    free: int

    @property
    def results(self) -> int:
        return self.weights + self.states + self.replaced


def disk_use(options: Options, inputs: Inputs) -> DiskUse:
    model = inputs.pretrained.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights, state = inputs.files.sizes(trained)
    return DiskUse(
        weights=2 * weights,
        states=options.save_total_limit * state,
        replaced=max(weights, state),
        quantized=_quantized(options, inputs),
        token_index=sum(_index(inputs, flag) for flag in inputs.surveys),
        free=free_space(options.save),
    )


def _quantized(options: Options, inputs: Inputs) -> int:
    if options.quantize == quantize.NONE or options.load is None:
        return 0
    checkpoint = Checkpoint(options.load)
    if cache_path(checkpoint.path, FORMATS[options.quantize]).is_file():
        return 0
    total = 0
    for name, p in inputs.pretrained.model.named_parameters():
        entry = checkpoint.entries.get(name)  # None for codes, absmax and the delta
        if entry is not None:
            total += p.numel() * entry.dtype.itemsize
        elif name.endswith((".codes", ".absmax")):
            total += p.nbytes
    return total


def _index(inputs: Inputs, flag: str) -> int:
    found = inputs.surveys[flag]
    if found.has_index or not len(found.lengths):
        return 0
    size = found.size
    records = size.num_records + size.num_too_long + size.num_unanswered
    mean = float(found.lengths.mean())
    return round(records * (mean * _INDEX_TOKEN + _INDEX_RECORD))
