"""Training: the loop, evaluation, schedules, and what a run writes."""
