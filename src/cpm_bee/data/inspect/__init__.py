"""What data is like, before it is trained on: inspect_data.py."""
