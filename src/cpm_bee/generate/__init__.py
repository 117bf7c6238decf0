"""Generation: a record's answers by beam search, one record at a time (SPEC §10)."""
