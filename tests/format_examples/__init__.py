"""The examples of docs/format.md, computed by the code, by name.

An example returns the leading cells of each row of a table (further columns are prose), or the
lines of a code block. What it starts from is read from the page itself.
"""

from __future__ import annotations

from format_examples import (
    binary,
    checkpoint,
    differences,
    generation,
    model,
    text,
    training,
)
from format_examples.common import EXAMPLES

__all__ = [
    "EXAMPLES", "binary", "checkpoint", "differences", "generation", "model", "text", "training",
]  # fmt: skip
