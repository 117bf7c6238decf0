"""A frozen base in 4 or 8 bit: number formats, quantized Linears, and the file that caches them.

This module has only names, so that a command's `--help` need not import torch.
"""

NONE = "none"
CHOICES = (NONE, "nf4", "int8")
