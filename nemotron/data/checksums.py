"""The files of prepared shards, compared with the checksums in their manifests."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from nemotron.data.folder import FileFacts, read_manifest
from nemotron.data.indexed import Stream
from nemotron.errors import UserError
from nemotron.files import hash_file


def known_files(streams: Iterable[Stream]) -> dict[Path, FileFacts]:
    """Return what the manifest beside each shard says of its files; nothing where there is none.

    Raises:
        UserError: when a manifest is damaged.
    """
    shards: dict[Path, Mapping[str, Mapping[str, FileFacts]]] = {}
    found: dict[Path, FileFacts] = {}
    for stream in streams:
        for shard in stream.shards:
            folder = shard.prefix.parent
            if folder not in shards:
                manifest = read_manifest(folder)
                known = (*manifest.train, *manifest.validation) if manifest else ()
                shards[folder] = {facts.name: facts.files for facts in known}
            files = shards[folder].get(shard.prefix.name, {})
            found |= {folder / name: facts for name, facts in files.items()}
    return found


def check_content(path: Path, facts: FileFacts) -> None:
    """Read a file and compare its xxh128.

    Raises:
        UserError: when it is another.
    """
    if hash_file(path) != facts.xxh128:
        raise UserError(
            "does not match its manifest; restore it, or prepare the data again.", where=str(path)
        )
