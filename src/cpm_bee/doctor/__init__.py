"""Checks a machine: its environment in seconds, and the GPU code in minutes."""
