"""The table of commands, by which a list in a test is known to be complete."""

from collections.abc import Iterator
from typing import Any

import typer.main

from nemotron.cli import app


def _leaves(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not hasattr(command, "commands"):
        yield words, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from _leaves(inner, (*words, name))


COMMANDS: dict[tuple[str, ...], Any] = dict(_leaves(typer.main.get_command(app)))
"""Every command that does something, by the words that call it."""
