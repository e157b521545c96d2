"""A file that the fuzzer damages, and who reads it."""

import functools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fuzz_mutations as mutate
import fuzz_requests as read
import xxhash
from ruamel.yaml import YAML


@dataclass(frozen=True)
class Target:
    """A file that is damaged, the commands of which one reads it, and which folders they use."""

    file: str
    """Its path in the world; of several that match a pattern, the first is damaged."""
    mutation: mutate.Mutation
    commands: list[list[str]]
    uses: tuple[str, ...] = ()
    """Folders and files beside the damaged one that a command reads or changes."""
    seal: Callable[[Path, random.Random], None] = lambda world, draw: None
    """Forges what vouches for the damaged file, so that its readers get to see it."""
    reader: read.Reader = read.run_command
    """What is called with a command's words."""
    is_refused: bool = False
    """Whether the commands refuse the undamaged file, too."""
    direct: Callable[[], object] | None = None
    """Reads the damaged file as its commands do, without what they do with it afterwards; where
    there is none, the commands are cheap enough."""


def forge_manifest(world: Path, draw: random.Random, step: str) -> None:
    """Let the manifest of the checkpoint have the hashes of its files, most times."""
    folder = world / step
    manifest = json.loads((folder / "manifest.json").read_bytes())
    if draw.random() < 0.1:
        return
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {
            "bytes": len(content),
            "xxh128": xxhash.xxh128(content).hexdigest(),
        }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def of_recipe(content: bytes, draw: random.Random) -> bytes:
    """Change a value of a recipe, which then stands there as JSON, or the bytes of its YAML."""
    if draw.random() < 0.4:
        return mutate.of_bytes(content, draw)
    return mutate.of_json(_as_json(content), draw)


@functools.lru_cache(16)
def _as_json(content: bytes) -> bytes:
    return json.dumps(YAML(typ="safe", pure=True).load(content.decode())).encode()
