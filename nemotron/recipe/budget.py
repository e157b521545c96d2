"""The files of one recipe, read within limits that are checked before any work."""

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from nemotron.errors import UserError

MAX_FILES = 64
"""Files that one recipe may consist of, a file counted as often as it is named."""
MAX_BYTES = 1 << 20
"""Size of these files together; a slow machine parses less than 100 kB of YAML a second."""


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
            raise UserError(
                f"{path}: the recipe names more than {MAX_FILES} files; merge some of them."
            )
        content = _read_regular(path, self.size)
        self.size -= len(content)
        if self.size < 0:
            raise UserError(
                f"{path}: the files of the recipe are larger than {MAX_BYTES >> 20} MiB; "
                "a recipe holds settings, not data."
            )
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}: byte {error.start} is not UTF-8 text; a recipe is a text file in YAML."
            ) from error


def _read_regular(path: Path, size: int) -> bytes:
    """Read a regular file, at most one byte more than `size`; never waits for a pipe or device."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UserError(f"{path} is not a regular file; name a recipe file (.yaml).")
            return file.read(size + 1)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; name an existing recipe.") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder; name a recipe file (.yaml).") from error
    except OSError as error:
        shown = str(path) if len(str(path)) <= 80 else f"{str(path)[:77]}..."
        raise UserError(f"{shown} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{str(path)!r} is not a path; remove the null character.") from error
