"""What this machine, or the ranks of a job, can run."""
