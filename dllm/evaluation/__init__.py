"""Evaluation: answering many requests, storing the results, resuming interrupted runs, metrics."""
