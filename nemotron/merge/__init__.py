"""Averaging the checkpoints of a run into one model."""
