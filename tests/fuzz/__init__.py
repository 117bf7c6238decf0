"""Mutated files for every reader of the product: `python -m fuzz.run`, see `fuzz.run`."""
