"""Verifying the shards of a run before it begins: the ranks share the work."""

import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import xxhash

from nemotron.data.checksums import check_content, known_files
from nemotron.data.indexed import Stream
from nemotron.parallel.runtime import Ranks

log = logging.getLogger(__name__)


def verify_checksums(streams: Sequence[Stream], ranks: Ranks) -> None:
    """Compare every file of these shards with its checksum; every rank must call it.

    Ranks that see the same files, by inode and time of change, share them; a machine with copies
    of its own verifies those. No rank waits for another longer than one file takes.

    Raises:
        UserError: on every rank, for the first files that differ.
    """
    files = known_files(streams)
    shards = [shard for stream in streams for shard in stream.shards]
    unknown = [str(shard.prefix) for shard in shards if shard.bin not in files]
    if unknown:
        log.warning(
            "%d shards have no manifest, and so no checksums, such as %s", len(unknown), unknown[0]
        )
    size = sum(facts.bytes for facts in files.values())
    log.info("comparing %d files, %.1f GB, with their checksums", len(files), size / 1e9)
    views = ranks.gather(_view(list(files)))
    alike = [rank for rank, view in enumerate(views) if view == views[ranks.rank]]
    mine = list(files.items())[alike.index(ranks.rank) :: len(alike)]

    def check(number: int) -> None:
        if number < len(mine):
            check_content(*mine[number])

    for number in range(max(ranks.gather(len(mine)))):
        ranks.each(partial(check, number))


def _view(files: Sequence[Path]) -> str:
    """Return a hash of which files these are, on this machine."""
    stamps = []
    for path in files:
        status = path.stat()
        stamps.append((str(path), status.st_size, status.st_mtime_ns, status.st_ino))
    return xxhash.xxh128_hexdigest(json.dumps(stamps).encode())
