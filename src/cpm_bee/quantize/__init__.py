"""A frozen base in 4 or 8 bit: number formats, the Linear over them, and the file they are kept in.

Names only, so that a command's `--help` need not import torch.
"""

NONE = "none"
CHOICES = (NONE, "nf4", "int8")
