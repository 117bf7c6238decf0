"""Checkpoints on disk: names, formats, sizes, sidecars, and loading."""
