"""The token index: tokens encoded once, stored as arrays and memory-mapped."""
