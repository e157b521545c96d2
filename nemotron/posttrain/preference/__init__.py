"""Learning from pairs of answers of which one is better (DPO)."""
