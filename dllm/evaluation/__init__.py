"""Answering many requests: what is kept of each answer, how a run goes on after an interruption, what it scores."""
