"""Checkpoints: written aside, committed by a manifest, verified before they are read."""
