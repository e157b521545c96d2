"""Adds the folders beside the package to it, recipes and start scripts; see pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["nemotron*"]), "nemotron.recipes", "nemotron.launch"],
    package_dir={"nemotron.recipes": "recipes", "nemotron.launch": "launch"},
)
