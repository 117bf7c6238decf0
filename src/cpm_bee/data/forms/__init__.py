"""Data as people have it (Alpaca, ShareGPT, CSV, Parquet, ...) -> records."""
