"""Measure encoding on one core: from a line of JSON to the arrays of an encoded record.

    python benchmarks/encoding.py --data BEE.jsonl --vocab VOCAB

Measures CPU time of the process, so that other processes disturb it less.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from cpm_bee.encoding import Encoder
from cpm_bee.tokenizer import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="bee records, one per line")
    parser.add_argument("--vocab", type=Path, required=True, help="vocabulary file")
    parser.add_argument("--repeats", type=int, default=3, help="the best one counts")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.load(arguments.vocab)
    lines = arguments.data.read_text(encoding="utf-8").splitlines()
    best = float("inf")
    for _ in range(arguments.repeats):
        encoder = Encoder(tokenizer)  # with empty caches
        started = time.process_time()
        tokens = sum(len(encoder.encode(json.loads(line))) for line in lines)
        best = min(best, time.process_time() - started)
    print(f"{len(lines):,} records, {tokens:,} tokens")
    print(f"{len(lines) / best:,.0f} records/s, {tokens / best:,.0f} tokens/s")


if __name__ == "__main__":
    main()
