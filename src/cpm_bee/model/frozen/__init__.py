"""Layers whose weights are frozen: their own forward and backward pass."""
