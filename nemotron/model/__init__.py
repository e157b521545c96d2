"""The model: plain modules that hold mathematics and nothing else."""
