"""Prediction of what a layout costs: memory, communication, speed, and broken rules."""
