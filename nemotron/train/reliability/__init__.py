"""What a run does about ranks, steps and replicas that go wrong."""
