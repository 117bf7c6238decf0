"""Tokens made once, stored as arrays and memory-mapped."""
