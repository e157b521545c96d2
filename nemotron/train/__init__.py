"""The trainer: loss, optimizer, schedule, metrics and the loop."""
