"""The CPM-Bee network in plain PyTorch."""
