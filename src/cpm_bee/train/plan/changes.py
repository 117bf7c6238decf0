"""The smallest changes of flags that make a run fit a GPU, best first.

Each change has a price, from the same result in more time to another model; sets of changes are
tried from the fewest on, and of equally many from the cheapest on. A set that fits is kept with the
mildest value of `--max-tokens` or `--max-length` with which it still does.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cpm_bee.delta import DeltaConfig
from cpm_bee.errors import InputError
from cpm_bee.train.plan.memory import Situation, fits, on_gpu, quantizable
from cpm_bee.train.plan.simulation import Peaks

_MOST_CHANGES = 3
_SHARDS = (2, 4, 8)
_LEAST_LENGTH = 64


@dataclass(frozen=True)
class Change:
    """One flag with its possible values, mildest first; `apply` returns the changed situation."""

    flag: str
    values: tuple[int, ...]
    effect: str
    apply: Callable[[Situation, int], Situation]

    def text(self, value: int) -> str:
        return self.flag if value == 0 else f"{self.flag} {value}"


@dataclass(frozen=True)
class Fix:
    """Flags that make it fit, what each costs, and the predicted peak with them."""

    flags: str
    effect: str
    peak: int


class KnownPeaks:
    """Predicted peaks on a GPU, each computed once; with `auto`, that of what auto chooses."""

    def __init__(self, auto_checkpointing: bool) -> None:
        self._auto = auto_checkpointing
        self._known: dict[str, Peaks] = {}

    def of(self, situation: Situation) -> Peaks:
        key = repr(replace(situation, training=None, evaluation=None))  # type: ignore[arg-type]
        if key not in self._known:
            self._known[key] = on_gpu(situation)
        return self._known[key]

    def fits(self, situation: Situation, card: int) -> int | None:
        """The peak with which it fits; None if it does not."""
        ways = [situation]
        if self._auto and not situation.checkpointing:
            ways.append(replace(situation, checkpointing=True))
        for way in ways:
            try:
                peak = self.of(way).peak
            except InputError:  # no record is short enough
                return None
            if fits(peak, card):
                return peak
        return None


def possible_changes(situation: Situation, auto_checkpointing: bool) -> list[Change]:
    """The changes that this run has not made yet, cheapest first."""
    lengths = situation.training.lengths
    longest = int(lengths[lengths <= situation.max_length].max())
    row = situation.rows * situation.max_length
    tokens = min(row, situation.max_tokens or row)
    found = []
    if sizes := _halved(tokens, longest):
        found.append(
            Change(
                "--max-tokens",
                sizes,
                "the same result, in smaller parts",
                lambda s, n: replace(s, max_tokens=n),
            )
        )
    if not auto_checkpointing and not situation.checkpointing:
        found.append(
            Change(
                "--checkpointing full",
                (0,),
                "the same result, about a third more time",
                lambda s, _: replace(s, checkpointing=True),
            )
        )
    if situation.delta is not None and quantizable(situation):
        found.append(_quantized())
    if situation.shards == 1 and situation.processes == 1:
        found.append(
            Change(
                "--parallel fsdp, GPUS_PER_NODE",
                _SHARDS,
                "the same mathematics, on so many GPUs, each with a part of the model",
                lambda s, n: replace(s, shards=n, processes=n),
            )
        )
    if situation.delta is None:
        found.append(
            Change(
                "--use-delta",
                (0,),
                "trains a LoRA instead of all weights",
                lambda s, _: replace(s, delta=DeltaConfig()),
            )
        )
        if quantizable(situation):
            found.append(_quantized(needs_delta=True))
    if sizes := _halved(situation.max_length, _LEAST_LENGTH):
        found.append(
            Change(
                "--max-length",
                tuple(n for n in sizes if (lengths <= n).any()),
                "leaves longer records out",
                lambda s, n: replace(s, max_length=n),
            )
        )
    return [change for change in found if change.values]


def _quantized(needs_delta: bool = False) -> Change:
    def apply(situation: Situation, _: int) -> Situation:
        delta = situation.delta or (DeltaConfig() if needs_delta else None)
        return replace(situation, quantize="nf4", delta=delta)

    flags = "--use-delta --quantize nf4" if needs_delta else "--quantize nf4"
    effect = "trains a LoRA, the frozen base in 4 bits" if needs_delta else "the base in 4 bits"
    return Change(flags, (0,), effect, apply)


def _halved(value: int, least: int) -> tuple[int, ...]:
    sizes = []
    while value > least:
        value = max(least, value // 2)
        sizes.append(value)
    return tuple(sizes)


def smallest_changes(
    situation: Situation, card: int, peaks: KnownPeaks, changes: Sequence[Change], most: int = 2
) -> list[Fix]:
    """Returns at most so many fixes for a card of so many GB; none if nothing here helps."""
    found: list[tuple[set[str], Fix]] = []
    for chosen in _sets(changes):
        flags = {change.flag for change in chosen}
        if any(fewer <= flags for fewer, _ in found):  # which fits already
            continue
        if (fix := _mildest(situation, card, peaks, chosen)) is not None:
            found.append((flags, fix))
        if len(found) == most:
            break
    return [fix for _, fix in found]


def _sets(changes: Sequence[Change]) -> Iterator[tuple[Change, ...]]:
    for count in range(1, _MOST_CHANGES + 1):
        for chosen in itertools.combinations(changes, count):
            flags = [c.flag for c in chosen]
            delta = "--use-delta" in flags and "--use-delta --quantize nf4" in flags
            sharded_nf4 = any("fsdp" in f for f in flags) and any("nf4" in f for f in flags)
            if not delta and not sharded_nf4:
                yield chosen


def _mildest(
    situation: Situation, card: int, peaks: KnownPeaks, chosen: Sequence[Change]
) -> Fix | None:
    def peak_with(values: Sequence[int]) -> int | None:
        changed = functools.reduce(
            lambda s, pair: pair[0].apply(s, pair[1]), zip(chosen, values, strict=True), situation
        )
        return peaks.fits(changed, card)

    strongest = [c.values[-1] for c in chosen]
    peak = peak_with(strongest)
    if peak is None:
        return None
    values = list(strongest)
    for place, change in enumerate(chosen):
        for value in change.values[:-1]:  # mildest first
            milder = peak_with([*values[:place], value, *values[place + 1 :]])
            if milder is not None:
                values[place], peak = value, milder
                break
    parts = list(zip(chosen, values, strict=True))
    lengths = situation.training.lengths
    effects = []
    for change, value in parts:
        effect = change.effect
        if change.flag == "--max-length":
            effect = f"leaves out {np.mean(lengths > value):.1%} of the records"
        effects.append(effect)
    return Fix(" ".join(c.text(v) for c, v in parts), "; ".join(effects), peak)
