"""Binary datasets, the token index beside them, the plan of batches, and the batch."""
