"""The scripts that languages are written in."""

NONE = -1
"""Number of a token whose letters, if it has any, are of no language or of several."""
