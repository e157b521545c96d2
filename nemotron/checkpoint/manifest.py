"""What makes a folder a checkpoint: a list of its files with sizes and hashes, written last."""

import importlib.metadata
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, NonNegativeInt, StringConstraints

from nemotron.checkpoint.records import DamagedCheckpoint, read_record
from nemotron.files import hash_file, write_json
from nemotron.section import Section

FORMAT = 2
"""Version of the checkpoint layout; raised when an older reader could not read it."""

OLD_FORMAT = 1
"""The layout whose index was a pickle; only `nemotron checkpoint convert` reads it."""

MANIFEST = "manifest.json"
MODEL = "model.json"
STATE = "state.json"
INDEX = "index.json"
RECORDS = (MODEL, STATE, INDEX)

STEP_FOLDER = re.compile(r"step-(\d{8,})")
TENSOR_FILE = re.compile(r"rank-\d{5,}\.safetensors")


class FileEntry(Section):
    """Size and hash of a file."""

    bytes: NonNegativeInt
    xxh128: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]


Files = dict[str, FileEntry]
"""Files of a checkpoint by name."""


class Manifest(Section):
    """The content of `manifest.json`."""

    format: int
    step: NonNegativeInt
    code_version: str
    model_config_hash: str
    files: Files


class _Format(BaseModel):
    format: int


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint whose manifest was read and whose files were compared with it."""

    folder: Path
    step: int
    files: Files


class OldCheckpoint(DamagedCheckpoint):
    """Says of a checkpoint of the old layout which command converts it."""


def folder_name(step: int) -> str:
    """Return the name of the checkpoint folder of a step."""
    return f"step-{step:08d}"


def steps(folder: Path) -> list[int]:
    """Return the steps that have a checkpoint folder, newest first, complete or not."""
    if not folder.is_dir():
        return []
    names = (STEP_FOLDER.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted((int(match[1]) for match in names if match), reverse=True)


def code_version() -> str:
    """Return the version of this package, or say that it runs from a folder."""
    try:
        return importlib.metadata.version("nemotron-train")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def describe_file(path: Path) -> FileEntry:
    """Return size and xxh128 of a file."""
    return FileEntry(bytes=path.stat().st_size, xxh128=hash_file(path))


def write_manifest(folder: Path, step: int, config_hash: str, known: Files) -> None:
    """List every file of `folder` with size and xxh128; from now on it is complete.

    `known` holds those that have been described already.
    """
    files = {
        path.name: known.get(path.name) or describe_file(path) for path in sorted(folder.iterdir())
    }
    content = Manifest(
        format=FORMAT,
        step=step,
        code_version=code_version(),
        model_config_hash=config_hash,
        files=files,
    )
    write_json(folder / MANIFEST, content.model_dump())


def read_manifest(folder: Path, layout: int = FORMAT) -> Manifest:
    """Return the manifest of a checkpoint folder.

    Raises:
        OldCheckpoint: when it has the old layout, which is not the one asked for.
        DamagedCheckpoint: when it is absent, unreadable, or of a newer format.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise DamagedCheckpoint(f"has no {MANIFEST}: the save did not finish")
    _check_regular(path)
    found = read_record(path, _Format).format
    if found == OLD_FORMAT != layout:
        whole = folder.parent.parent if folder.parent.name == "checkpoints" else folder
        raise OldCheckpoint(
            f"{folder} was written by an older version, in a format that is no longer read; "
            f"convert it once with: nemotron checkpoint convert {whole}"
        )
    if found != layout:
        raise DamagedCheckpoint(
            f"has format {found}, this version reads format {FORMAT}: upgrade nemotron-train"
        )
    return read_record(path, Manifest)


def verify(folder: Path, *, content: bool = True, share: slice = slice(None)) -> CheckpointInfo:
    """Compare every file with the manifest, before anything in it is interpreted.

    `content=False` looks at names and sizes only; `share` chooses the files that are hashed, where
    several processes verify together.

    Raises:
        OldCheckpoint: when it has the old layout.
        DamagedCheckpoint: naming the first file that differs.
    """
    manifest = read_manifest(folder)
    for name in manifest.files:
        if name not in RECORDS and not TENSOR_FILE.fullmatch(name):
            raise DamagedCheckpoint(f"{MANIFEST}: files.{name[:80]!r} is not part of a checkpoint")
    for name in RECORDS:
        if name not in manifest.files:
            raise DamagedCheckpoint(f"{MANIFEST} does not list {name}")
    hashed = list(manifest.files)[share] if content else []
    compare_files(folder, manifest, hashed)
    if (named := STEP_FOLDER.fullmatch(folder.name)) and int(named[1]) != manifest.step:
        raise DamagedCheckpoint(f"{MANIFEST}: step = {manifest.step} is not that of {folder.name}")
    return CheckpointInfo(folder, manifest.step, manifest.files)


def compare_files(folder: Path, manifest: Manifest, hashed: list[str]) -> None:
    """Compare the sizes of all files and the content of some with the manifest.

    Raises:
        DamagedCheckpoint: naming the first file that differs.
    """
    for name, expected in manifest.files.items():
        path = folder / name
        if name != path.name or name in ("..", "."):
            raise DamagedCheckpoint(
                f"{MANIFEST} names {name[:80]!r}, which is not a plain file beside it"
            )
        size = _check_regular(path)
        if size != expected.bytes:
            raise DamagedCheckpoint(f"{name} has {size} bytes instead of {expected.bytes}")
        if name in hashed and hash_file(path) != expected.xxh128:
            raise DamagedCheckpoint(f"the content of {name} does not match its hash")


def _check_regular(path: Path) -> int:
    """Return the size of a file that is neither a link nor a device."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path.name} is missing") from None
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{path.name[:80]!r} cannot be read: {error}") from None
    if not stat.S_ISREG(found.st_mode):
        raise DamagedCheckpoint(f"{path.name} is not a regular file")
    return found.st_size
