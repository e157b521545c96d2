"""Training after pre-training: reinforcement learning in environments."""
