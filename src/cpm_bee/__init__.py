"""Fine-tuning, evaluation and generation for the CPM-Bee language models."""

__version__ = "0.1.0"
