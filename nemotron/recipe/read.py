"""Files of one recipe as plain values, with the line of every key, read within limits."""

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemotron.errors import UserError
from nemotron.yaml_text import Path_, parse_yaml

MAX_FILES = 64
"""Files that one recipe may consist of, a file counted as often as it is named."""
MAX_BYTES = 1 << 20
"""Size of these files together; a slow machine parses less than 100 kB of YAML a second."""


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


@dataclass
class Budget:
    """What one recipe may still read."""

    files: int = MAX_FILES
    size: int = MAX_BYTES
    paths: list[Path] = field(default_factory=list)
    """What was read."""

    def read(self, path: Path) -> str:
        """Return the text of a regular file.

        Raises:
            UserError: when it cannot be read, is not UTF-8, or the recipe becomes too large.
        """
        self.files -= 1
        self.paths.append(path)
        if self.files < 0:
            rule = f"the recipe names more than {MAX_FILES} files; merge some of them."
            raise UserError(rule, where=str(path))
        content = _read_regular(path, self.size)
        self.size -= len(content)
        if self.size < 0:
            raise UserError(
                f"the files of the recipe are larger than {MAX_BYTES >> 20} MiB; "
                "a recipe holds settings, not data.",
                where=str(path),
            )
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            rule = f"byte {error.start} is not UTF-8 text; a recipe is a text file in YAML."
            raise UserError(rule, where=str(path)) from error


def read_yaml(path: Path, budget: Budget | None = None) -> Document:
    """Read a YAML 1.2 file whose top is a mapping; duplicate keys are refused.

    `budget` is what the recipe that the file belongs to may still read.

    Raises:
        UserError: when the file cannot be read or parsed, with line and column.
    """
    document = read_yaml_values(path, budget)
    if document.values is None:
        raise UserError(
            "is empty; a recipe is a YAML mapping such as `name: my-run`.", where=str(path)
        )
    if not isinstance(document.values, dict):
        rule = "the top must be a mapping such as `name: my-run`."
        raise UserError(rule, where=f"{path}:1")
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


def _read_regular(path: Path, size: int) -> bytes:
    """Read a regular file, at most one byte more than `size`; never waits for a pipe or device."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UserError(
                    "is not a regular file; name a recipe file (.yaml).", where=str(path)
                )
            return file.read(size + 1)
    except FileNotFoundError as error:
        rule = "there is no such file; name an existing recipe."
        raise UserError(rule, where=str(path)) from error
    except IsADirectoryError as error:
        raise UserError("is a folder; name a recipe file (.yaml).", where=str(path)) from error
    except OSError as error:
        shown = str(path) if len(str(path)) <= 80 else f"{str(path)[:77]}..."
        rule = f"cannot be read: {error.strerror}."
        raise UserError(rule, where=shown, because=error) from error
    except ValueError as error:
        raise UserError(
            "is not a path; remove the null character.", where=f"{str(path)!r}"
        ) from error
