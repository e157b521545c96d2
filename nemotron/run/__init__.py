"""The folder of a run: what is written into it, shown and sent of it, and what stops it."""
