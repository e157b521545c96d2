"""Recipes: one YAML file becomes one checked, frozen configuration."""
