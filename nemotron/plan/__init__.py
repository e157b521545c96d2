"""What a layout would cost before anything starts: memory, traffic, speed, and broken rules."""
