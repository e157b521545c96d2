"""Tasks with verifiers: rows that become prompts, and rewards for the answers."""
