"""Correcting text in parallel: a source is read again, and each slot answered at its own place."""
