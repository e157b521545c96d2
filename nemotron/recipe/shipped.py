"""The recipes and start scripts that ship with the package: found by name, listed, copied."""

import difflib
import itertools
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nemotron.errors import UserError
from nemotron.files import naming

PACKAGE = Path(__file__).parents[1]
PARTS = ("model", "blends", "layouts")
"""Files and folders of parts, which are not recipes by themselves."""
SCHEMA = "schema.json"
RECIPE_OF_A_RUN = "recipe.yaml"


def home(folder: str = "recipes") -> Path:
    """Return the shipped folder: inside an installed package, beside it in the repository."""
    inside = PACKAGE / folder
    return inside if inside.is_dir() else PACKAGE.parent / folder


def names() -> list[str]:
    """Return the names of all complete recipes, such as tiny/pretrain."""
    found = [path.relative_to(home()).with_suffix("") for path in home().rglob("*.yaml")]
    return sorted(str(name) for name in found if not set(PARTS) & set(name.parts))


def find(path: Path, name: str) -> Path:
    """Return the path, or if there is no such file, that of the shipped recipe of this name.

    The folder of a run stands for the recipe in it.

    Raises:
        UserError: when there is neither, and the name looks like that of a shipped recipe.
    """
    if os.path.isfile(own := path / RECIPE_OF_A_RUN):
        return own
    if os.path.isdir(path) and name not in names():
        raise UserError(
            f"is a folder without {RECIPE_OF_A_RUN}; give a recipe, or the folder of a run.",
            where=str(path),
        )
    if os.path.isfile(path) or path.suffix:
        return path
    is_near = name in (known := names()) or difflib.get_close_matches(name, known, 1)
    return path_of(name) if is_near and not os.path.exists(path) else path


def path_of(name: str) -> Path:
    """Return the file of a shipped recipe.

    Raises:
        UserError: when there is none of this name.
    """
    if name not in (known := names()):
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else "see nemotron recipe list."
        raise UserError(f"there is no such recipe; {hint}", where=name)
    return home() / f"{name}.yaml"


def summary(name: str) -> str:
    """Return the first sentence of the comment at the top of a shipped recipe, if it has one."""
    lines = path_of(name).read_text(encoding="utf-8").splitlines()[1:]
    comment = " ".join(
        line.removeprefix("#").strip()
        for line in itertools.takewhile(lambda line: line.startswith("#"), lines)
    )
    return re.split(r"(?<=[.?]) ", comment)[0]


@dataclass(frozen=True)
class Copy:
    """A file and where it is to go."""

    source: Path
    target: Path

    @property
    def is_there(self) -> bool:
        """Whether the target has the file's content already."""
        return self.target.is_file() and self.target.read_bytes() == self.source.read_bytes()


def copy(files: Iterable[Path], out: Path, launch: Path | None = None) -> list[Path]:
    """Copy the files of a shipped recipe into a folder; returns what was written.

    The start scripts go to `launch`, if that is given.

    Raises:
        UserError: when a file there has other content; then nothing is written.
    """
    sources = [home() / SCHEMA, *files]
    copies = [Copy(source, out / source.relative_to(home())) for source in sources]
    if launch is not None:
        scripts = sorted(path for path in home("launch").iterdir() if path.is_file())
        copies += [Copy(script, launch / script.name) for script in scripts]
    missing = [item for item in copies if not item.is_there]
    for item in missing:
        if item.target.exists():
            raise UserError(
                "exists with other content; copy into another folder with --out.",
                where=str(item.target),
            )
    for item in missing:
        item.target.parent.mkdir(parents=True, exist_ok=True)
        with naming(item.target):
            shutil.copy(item.source, item.target)
    return [item.target for item in missing]
