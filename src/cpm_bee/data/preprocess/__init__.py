"""JSON lines -> shuffled binary dataset and token index."""
