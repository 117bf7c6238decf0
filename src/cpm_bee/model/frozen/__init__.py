"""Blocks with a frozen base: their own forward and backward pass."""
