"""The folder of a run: its files, its screen output, its trackers, and signals that stop it."""
