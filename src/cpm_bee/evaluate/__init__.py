"""Evaluation of a model on a file of records: figures, their uncertainty, and a verdict."""
