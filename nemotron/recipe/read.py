"""One YAML file as plain values, with the line of every key."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from nemotron.errors import UserError

Path_ = tuple[str, ...]
"""Keys from the top of a recipe to a value."""


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


def read_yaml(path: Path) -> Document:
    """Read a YAML 1.2 file whose top is a mapping; duplicate keys are refused.

    Raises:
        UserError: when the file cannot be read or parsed, with line and column.
    """
    document = read_yaml_values(path)
    if document.values is None:
        raise UserError(f"{path} is empty; a recipe is a YAML mapping such as `name: my-run`.")
    if not isinstance(document.values, dict):
        raise UserError(f"{path}:1: the top must be a mapping such as `name: my-run`.")
    return document


def read_yaml_values(path: Path) -> Document:
    """Read a YAML 1.2 file with any content.

    Raises:
        UserError: when the file cannot be read or parsed, with line and column.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; name an existing recipe.") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder; name a recipe file (.yaml).") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.start} is not UTF-8 text; a recipe is a text file in YAML."
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    values = parse_yaml(text, str(path))
    document = Document()
    document.values = _plain(values, str(path), (), document.places)
    return document


def parse_yaml(text: str, source: str) -> Any:  # Any: whatever the text holds
    """Parse YAML 1.2 text, keeping line numbers.

    Raises:
        UserError: when it is not valid YAML, with the parser's line and column.
    """
    try:
        return YAML(typ="rt", pure=True).load(text)
    except DuplicateKeyError as error:
        first, second = error.context_mark, error.problem_mark
        key = str(error.problem).split('"')[1] if '"' in str(error.problem) else "?"
        lines = text.splitlines()[first.line : second.line + 1]
        begins = [line[second.column :].startswith(key) for line in lines]
        line = first.line + (begins.index(True) if True in begins else 0) + 1
        raise UserError(
            f"{source}:{second.line + 1}: the key {key} is given twice, first at line {line}; "
            f"keep one of them."
        ) from error
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = " ".join(str(error.problem or error.context or "is not valid YAML").split())
        raise UserError(f"{source}{where}: {problem}; correct the YAML there.") from error
    except (YAMLError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{source}: {problem[:200]}; correct the YAML there.") from error


def place_of(places: dict[Path_, str], path: Path_, source: str) -> str:
    """Return `file:line` of the key, or of the nearest mapping around it that was written."""
    for length in range(len(path), 0, -1):
        if path[:length] in places:
            return places[path[:length]]
    return source


def _plain(value: Any, source: str, path: Path_, places: dict[Path_, str]) -> Any:
    """Turn the parser's types into plain ones and record the location of each key."""
    if isinstance(value, CommentedMap):
        result = {}
        for key, item in value.items():
            if not isinstance(key, str):
                line = value.lc.key(key)[0] + 1
                raise UserError(f"{source}:{line}: the key {key!r} is not text; keys must be text.")
            places[(*path, key)] = f"{source}:{value.lc.key(key)[0] + 1}"
            result[str(key)] = _plain(item, source, (*path, str(key)), places)
        return result
    if isinstance(value, CommentedSeq):
        items = []
        for index, item in enumerate(value):
            places[(*path, str(index))] = f"{source}:{value.lc.item(index)[0] + 1}"
            items.append(_plain(item, source, (*path, str(index)), places))
        return items
    return plain_scalar(value)


def plain_scalar(value: Any) -> Any:
    """Return a YAML scalar as bool, int, float, str or None; anything else as its text."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return str(value)
