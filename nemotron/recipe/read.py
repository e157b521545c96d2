"""One YAML file as plain values, with the line of every key."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemotron.errors import UserError
from nemotron.recipe.budget import Budget
from nemotron.recipe.yaml_text import Path_, parse_yaml


@dataclass(frozen=True)
class Idle:
    """Dotted keys that nothing reads if a condition holds."""

    keys: list[str]
    holds: bool
    because: str


@dataclass
class Document:
    """The values of one source, and the location of each as `file:line`."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Path_, str] = field(default_factory=dict)


def read_yaml(path: Path, budget: Budget | None = None) -> Document:
    """Read a YAML 1.2 file whose top is a mapping; duplicate keys are refused.

    `budget` is what the recipe that the file belongs to may still read.

    Raises:
        UserError: when the file cannot be read or parsed, with line and column.
    """
    document = read_yaml_values(path, budget)
    if document.values is None:
        raise UserError(f"{path} is empty; a recipe is a YAML mapping such as `name: my-run`.")
    if not isinstance(document.values, dict):
        raise UserError(f"{path}:1: the top must be a mapping such as `name: my-run`.")
    return document


def read_yaml_values(path: Path, budget: Budget | None = None) -> Document:
    """Read a YAML 1.2 file with any content.

    Raises:
        UserError: when the file cannot be read or parsed, with line and column.
    """
    document = Document()
    text = (budget or Budget()).read(path)
    document.values = parse_yaml(text, str(path), document.places)
    return document


def place_of(places: dict[Path_, str], path: Path_, source: str) -> str:
    """Return `file:line` of the key, or of the nearest mapping around it that was written."""
    for length in range(len(path), 0, -1):
        if path[:length] in places:
            return places[path[:length]]
    return source
