"""What makes a folder a checkpoint: a list of its files with sizes and hashes, written last."""

import importlib.metadata
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron.files import hash_file, write_json

FORMAT = 1
"""Version of the checkpoint layout; raised when an older reader could not read it."""

MANIFEST = "manifest.json"
MODEL = "model.json"
STATE = "state.json"

STEP_FOLDER = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint whose manifest was read and whose files were compared with it."""

    folder: Path
    step: int
    files: frozenset[str]


class DamagedCheckpoint(Exception):
    """Says in one clause what is wrong with a checkpoint folder."""


def folder_name(step: int) -> str:
    """Return the name of the checkpoint folder of a step."""
    return f"step-{step:08d}"


def code_version() -> str:
    """Return the version of this package, or say that it runs from a folder."""
    try:
        return importlib.metadata.version("nemotron-train")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def describe_file(path: Path) -> dict[str, Any]:  # Any: JSON
    """Return size and xxh128 of a file."""
    return {"bytes": path.stat().st_size, "xxh128": hash_file(path)}


def write_manifest(
    folder: Path, step: int, config_hash: str, known: dict[str, dict[str, Any]]
) -> None:
    """List every file of `folder` with size and xxh128; from now on it is complete.

    `known` holds those that other ranks have described already.
    """
    files = {
        path.name: known.get(path.name) or describe_file(path) for path in sorted(folder.iterdir())
    }
    content = {
        "format": FORMAT,
        "step": step,
        "code_version": code_version(),
        "model_config_hash": config_hash,
        "files": files,
    }
    write_json(folder / MANIFEST, content)


def read_manifest(folder: Path) -> dict:
    """Return the manifest of a checkpoint folder.

    Raises:
        DamagedCheckpoint: when it is absent, unreadable, or of a newer format.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise DamagedCheckpoint(f"has no {MANIFEST}: the save did not finish") from None
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{MANIFEST} cannot be read: {error}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise DamagedCheckpoint(f"{MANIFEST} is not a manifest")
    if manifest.get("format") != FORMAT:
        raise DamagedCheckpoint(
            f"has format {manifest.get('format')}, this version reads format {FORMAT}: "
            f"upgrade nemotron-train"
        )
    if not isinstance(manifest.get("step"), int):
        raise DamagedCheckpoint(f"{MANIFEST} names no step")
    for name, entry in manifest["files"].items():
        if not isinstance(entry, dict) or not {"bytes", "xxh128"} <= entry.keys():
            raise DamagedCheckpoint(f"{MANIFEST} lacks size or hash of {name}")
    return manifest


def verify(folder: Path, *, content: bool = True, share: slice = slice(None)) -> CheckpointInfo:
    """Compare every file with the manifest, before anything in it is interpreted.

    `content=False` looks at names and sizes only; `share` chooses the files that are hashed, where
    several processes verify together.

    Raises:
        DamagedCheckpoint: naming the first file that differs.
    """
    manifest = read_manifest(folder)
    hashed = set(list(manifest["files"])[share])
    for name, expected in manifest["files"].items():
        path = folder / name
        if name != path.name or name in ("..", ".") or path.is_symlink():
            raise DamagedCheckpoint(
                f"{MANIFEST} names {name!r}, which is not a plain file beside it"
            )
        if not path.is_file():
            raise DamagedCheckpoint(f"{name} is missing")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise DamagedCheckpoint(f"{name} has {size} bytes instead of {expected['bytes']}")
        if content and name in hashed and hash_file(path) != expected["xxh128"]:
            raise DamagedCheckpoint(f"the content of {name} does not match its hash")
    for name in (MODEL, STATE, ".metadata"):
        if name not in manifest["files"]:
            raise DamagedCheckpoint(f"{MANIFEST} does not list {name}")
    return CheckpointInfo(folder, manifest["step"], frozenset(manifest["files"]))
