"""Generation: a record's answers by beam search, one record at a time (docs/format.md §10)."""
