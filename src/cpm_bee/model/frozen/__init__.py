"""Custom forward and backward passes for layers whose weights are frozen."""
