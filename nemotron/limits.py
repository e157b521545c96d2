"""Limits that hold for a command's options and for a recipe's keys alike."""

MOST_TASKS = 1_000_000
"""Rows of a task that a model is asked."""
MOST_SAMPLES = 100_000
"""Answers to each row."""
