from __future__ import annotations

import numpy as np
import pytest
from golden.conftest import GoldenStep, Packed

from cpm_bee.data.batch import Batch

NAMES = ("packing", "packing_tight")


def rows_of(batch: Batch, step: GoldenStep, stream: np.ndarray) -> list[np.ndarray]:
    """A per-token array of the stream, cut into the rows of the step."""
    lengths = list(batch.lengths)
    counts = []
    for row in step.rows:
        counts.append(sum(lengths[: len(row)]))
        lengths = lengths[len(row) :]
    assert not lengths
    return np.split(stream, np.cumsum(counts)[:-1])


def per_token(batch: Batch, values: list[int]) -> np.ndarray:
    return np.repeat(np.array(values), batch.lengths)


@pytest.mark.parametrize("name", NAMES)
def test_every_batch(packed: dict[str, Packed], name: str) -> None:
    arrays, records, steps, batches = packed[name]
    assert len(batches) == arrays["num_batches"]
    used = sorted(n for step in steps for n in step.numbers)
    assert used == [n for n, r in enumerate(records) if len(r) <= arrays["max_length"]]
    for b, (step, batch) in enumerate(zip(steps, batches, strict=True)):
        target = np.full(batch.num_tokens, -100)
        target[batch.target_positions] = batch.targets
        spans = [i for row in step.rows for i in range(len(row))]
        ours = {
            "inputs": batch.ids.numpy(),
            "inputs_sub": batch.subs.numpy(),
            "context": batch.context.numpy(),
            "segment_ids": batch.segments.numpy(),
            "num_segments": per_token(batch, list(batch.num_segments)),
            "spans": per_token(batch, spans),
            "target": target,
        }
        lengths = arrays[f"b{b}.length"]
        assert [len(row) for row in rows_of(batch, step, target)] == lengths.tolist()
        for key, stream in ours.items():
            if f"b{b}.{key}" not in arrays:
                assert (name, key) in {
                    ("packing_tight", k) for k in ("context", "segment_ids", "num_segments")
                }
                continue
            for y, row in enumerate(rows_of(batch, step, stream)):
                theirs = arrays[f"b{b}.{key}"][y]
                np.testing.assert_array_equal(row, theirs[: len(row)], f"b{b}.{key} row {y}")
                # Behind the row there is nothing to learn.
                assert key != "target" or (theirs[len(row) :] == -100).all()


def test_relations_and_extension_tables(packed: dict[str, Packed]) -> None:
    arrays, _, steps, batches = packed["packing"]
    for b, (step, batch) in enumerate(zip(steps, batches, strict=True)):
        relations = batch.relations.numpy()
        sizes = [s * s for s in batch.num_segments]
        place = record = 0
        for y, row in enumerate(step.rows):
            size = sum(sizes[record : record + len(row)])
            theirs = arrays[f"b{b}.segment_rel"][y]
            np.testing.assert_array_equal(relations[place : place + size], theirs[:size])
            assert not theirs[size:].any()
            starts = np.cumsum([0, *sizes[record : record + len(row) - 1]])
            offsets = np.repeat(starts, batch.lengths[record : record + len(row)])
            theirs = arrays[f"b{b}.segment_rel_offset"][y]
            np.testing.assert_array_equal(offsets, theirs[: len(offsets)])
            place, record = place + size, record + len(row)
        assert place == len(relations)
        assert batch.extension_ids.tolist() == arrays[f"b{b}.ext_ids"].tolist()
        assert batch.extension_subs.tolist() == arrays[f"b{b}.ext_sub"].tolist()
        assert not arrays[f"b{b}.sample_ids"].any()  # a format for several samples is not covered
