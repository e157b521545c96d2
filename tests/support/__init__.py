"""What several test files share: small models, runs, processes, clusters."""
