"""Which documents of a shard are held out, decided by their content; what the shard holds."""

import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from nemotron.data.indexed import Shard
from nemotron.files import hash_file, locked, sync, sync_folder, write_json

log = logging.getLogger(__name__)

FORMAT = 1
"""Part of a stored split's name; raise it when its content changes."""


@dataclass(frozen=True)
class Contents:
    """What one pass over every token of a shard found."""

    documents: int
    """Documents that hold at least one token."""
    empty_documents: int
    tokens: int
    hash: str
    """xxh128 over the documents in order, the same for every id type."""
    largest: int
    """Largest id, or a negative one, with its first document and its first place in that."""
    largest_document: int
    largest_position: int


@dataclass(frozen=True)
class Split:
    """Documents to train on and documents held out.

    `train` and `validation` number documents of the shard in order; `train_ends` and
    `validation_ends` count the tokens up to the end of each.
    """

    contents: Contents
    train: NDArray[np.int64]
    train_ends: NDArray[np.int64]
    validation: NDArray[np.int64]
    validation_ends: NDArray[np.int64]


def is_held_out(digest: int, fraction: float) -> bool:
    """Say whether a document with this 64-bit hash belongs to the held-out `fraction`."""
    return digest < fraction * 2**64


def split_shard(shard: Shard, fraction: float, cache: Path) -> Split:
    """Return the shard's split, made by one pass over its tokens or found in `cache`.

    A document is held out by the hash of its ids alone: neither its place, nor the other
    documents, nor the shard's id type matters.
    """
    status = shard.bin.stat()
    identity = [FORMAT, str(shard.prefix), hash_file(shard.idx), repr(fraction)]
    identity += [status.st_size, status.st_mtime_ns]
    folder = cache / f"split-{xxhash.xxh64_hexdigest(json.dumps(identity).encode())}"
    with locked(cache / ".lock"):
        if not folder.exists():
            _store(_scan(shard, fraction), folder)
    contents = Contents(**json.loads((folder / "contents.json").read_text()))
    if contents.empty_documents:
        log.warning("%s: skipped %d empty documents", shard.prefix, contents.empty_documents)
    names = ("train", "train_ends", "validation", "validation_ends")
    return Split(contents, *(np.load(folder / f"{name}.npy", mmap_mode="r") for name in names))


def _store(split: Split, folder: Path) -> None:
    """Write the split aside and rename it; the caller holds the lock."""
    part = folder.with_suffix(".tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for name in ("train", "train_ends", "validation", "validation_ends"):
        with open(part / f"{name}.npy", "wb") as file:
            np.save(file, getattr(split, name))
            sync(file)
    write_json(part / "contents.json", asdict(split.contents))
    part.rename(folder)
    sync_folder(folder.parent)


def _scan(shard: Shard, fraction: float) -> Split:
    """Read every token once."""
    starts = shard.starts(slice(None))
    lengths = np.diff(starts)
    held_out = np.zeros(shard.num_documents, dtype=bool)
    whole = xxhash.xxh128()
    largest: tuple[np.uint64, int, int] | None = None
    for number in np.flatnonzero(lengths):
        tokens = shard.tokens[starts[number] : starts[number + 1]]
        # Ids are hashed as int32 whatever their type; those that do not fit are refused later.
        digest = xxhash.xxh64_digest(tokens.astype("<i4").tobytes())
        whole.update(digest)
        held_out[number] = is_held_out(int.from_bytes(digest, "big"), fraction)
        # Without its sign a negative id, which no vocabulary has, is the largest of all.
        unsigned = tokens.astype(np.int64).view(np.uint64)
        position = int(unsigned.argmax())
        if largest is None or unsigned[position] > largest[0]:
            largest = (unsigned[position], int(number), position)
    assert largest is not None, f"{shard.bin} is empty"
    kept = [np.flatnonzero((lengths > 0) & side) for side in (~held_out, held_out)]
    contents = Contents(
        documents=int(np.count_nonzero(lengths)),
        empty_documents=int(np.count_nonzero(lengths == 0)),
        tokens=shard.num_tokens,
        hash=whole.hexdigest(),
        largest=int(largest[0].astype(np.int64)),
        largest_document=largest[1],
        largest_position=largest[2],
    )
    sides = [array for side in kept for array in (side, np.cumsum(lengths[side]))]
    return Split(contents, *sides)
