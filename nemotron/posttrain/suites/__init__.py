"""Suites: tasks of the environments, answered and judged to say how good a model is."""
