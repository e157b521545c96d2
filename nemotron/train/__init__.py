"""The trainer: loss, optimizer, schedule and the loop."""
