"""Whole documents put into rows: where they fit first in order, or where they fit best."""

import bisect
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from nemotron.data.cache import held_cache, map_array, new_entry
from nemotron.data.config import PackingConfig
from nemotron.data.indexed import Stream
from nemotron.files import read_regular, sync, write_json

log = logging.getLogger(__name__)

FORMAT = 1
"""Part of a stored plan's name; raise it when its content changes."""
GROUP = 1 << 16
"""Documents that are packed together, so that memory does not grow with the source."""
ARRAYS = ("starts", "lengths", "row_ends")


@dataclass(frozen=True)
class PackingCounts:
    """What became of the documents."""

    documents: int = 0
    rows: int = 0
    tokens: int = 0
    """Tokens in rows."""
    split_documents: int = 0
    """Documents in several pieces, none of them lost."""
    dropped_documents: int = 0
    truncated_documents: int = 0
    lost_tokens: int = 0
    """Tokens of dropped documents, and those cut off truncated ones."""

    def describe(self, capacity: int) -> str:
        """Return one clause for the log."""
        padding = 1 - self.tokens / (self.rows * capacity) if self.rows else 0.0
        return (
            f"{self.rows:,} rows, {padding:.2%} padding; of {self.documents:,} documents "
            f"{self.split_documents:,} split, {self.dropped_documents:,} dropped, "
            f"{self.truncated_documents:,} truncated ({self.lost_tokens:,} tokens lost)"
        )


@dataclass(frozen=True)
class RowPlan:
    """Which pieces of a stream make each row.

    `starts` and `lengths` are the pieces, in tokens of the stream; `row_ends` counts the pieces up
    to the end of each row.
    """

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    row_ends: NDArray[np.int64]
    counts: PackingCounts

    def pieces(self, row: int) -> list[tuple[int, int]]:
        """Return start and length of each piece of a row, in order."""
        first = int(self.row_ends[row - 1]) if row else 0
        chosen = slice(first, int(self.row_ends[row]))
        return list(zip(self.starts[chosen].tolist(), self.lengths[chosen].tolist(), strict=True))


def plan_rows(
    stream: Stream, identity: str, capacity: int, config: PackingConfig, cache: Path
) -> RowPlan:
    """Return the rows of up to `capacity` tokens of a stream, made now or found in `cache`."""
    what = [FORMAT, identity, capacity, config.kind, config.long_documents]
    folder = cache / f"rows-{xxhash.xxh64_hexdigest(json.dumps(what).encode())}"
    with held_cache(cache):
        if (plan := _find(folder, stream, capacity)) is None:
            _store(pack_stream(stream, capacity, config), folder)
            plan = _find(folder, stream, capacity)
    assert plan is not None, f"what was just written into {folder} cannot be read"
    return plan


def _find(folder: Path, stream: Stream, capacity: int) -> RowPlan | None:
    """Return a stored plan; None where there is none, or one that cannot be of this stream."""
    try:
        starts, lengths, row_ends = (map_array(folder / f"{n}.npy", np.int64) for n in ARRAYS)
        counts = PackingCounts(**json.loads(read_regular(folder / "counts.json")))
        plan = RowPlan(starts, lengths, row_ends, counts)
        if _fits(plan, stream, capacity):
            return plan
    except (OSError, ValueError, TypeError, RecursionError):
        pass
    if folder.exists():
        log.warning("%s is damaged and is written again", folder)
    return None


def _fits(plan: RowPlan, stream: Stream, capacity: int) -> bool:
    """Say whether all pieces lie in the stream, and are as many as the counts say."""
    starts, lengths, ends = plan.starts, plan.lengths, plan.row_ends
    if not all(type(value) is int for value in asdict(plan.counts).values()):
        return False
    sizes = np.diff(ends, prepend=0)
    return (
        len(starts) == len(lengths) == (int(ends[-1]) if len(ends) else 0)
        and (plan.counts.rows, plan.counts.tokens) == (len(ends), int(lengths.sum()))
        and bool((sizes > 0).all() and (starts >= 0).all())
        and bool(((lengths > 0) & (lengths <= capacity)).all())
        and bool((starts <= stream.num_tokens - lengths).all())
    )


def pack_stream(stream: Stream, capacity: int, config: PackingConfig) -> RowPlan:
    """Pack every document of a stream into rows of up to `capacity` tokens."""
    counts = dict.fromkeys(asdict(PackingCounts()), 0)
    starts, lengths, sizes = [], [], []
    place = first_fit if config.kind == "sequential" else best_fit
    for documents in _groups(stream):
        pieces = _cut(*documents, capacity, config.long_documents, counts)
        for row in place(pieces[1].tolist(), capacity):
            starts.append(pieces[0][row])
            lengths.append(pieces[1][row])
            sizes.append(len(row))
    empty = np.zeros(0, np.int64)
    plan = [np.concatenate([empty, *part]) for part in (starts, lengths)]
    counts |= {"rows": len(sizes), "tokens": int(plan[1].sum())}
    ends = np.cumsum(np.asarray(sizes, np.int64))
    return RowPlan(plan[0], plan[1], ends, PackingCounts(**counts))


def first_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Fill one row after the other in order; a piece that does not fit opens the next row."""
    rows: list[list[int]] = []
    room = 0
    for number, length in enumerate(lengths):
        if length > room:
            rows.append([])
            room = capacity
        rows[-1].append(number)
        room -= length
    return rows


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Put pieces, longest first, each into the row that it leaves with the least room.

    Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling", section 3.2.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the sorted keys of with_room
    for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[number]
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        rows[row].append(number)
        if room := room - length:
            if room not in with_room:
                with_room[room] = []
                bisect.insort(rooms, room)
            with_room[room].append(row)
    return rows


def _groups(stream: Stream) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield starts in the stream and lengths of documents with tokens, `GROUP` at a time."""
    for shard, end in zip(stream.shards, stream.ends.tolist(), strict=True):
        for first in range(0, shard.num_documents, GROUP):
            last = min(first + GROUP, shard.num_documents)
            edges = shard.starts(slice(first, last + 1))
            kept = np.flatnonzero(np.diff(edges))
            yield end - shard.num_tokens + edges[kept], np.diff(edges)[kept]


def _cut(
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    capacity: int,
    long_documents: str,
    counts: dict[str, int],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return pieces of at most `capacity` tokens, and count what was done to get them."""
    counts["documents"] += len(lengths)
    long = lengths > capacity
    if not long.any():
        return starts, lengths
    if long_documents == "drop":
        counts["dropped_documents"] += int(long.sum())
        counts["lost_tokens"] += int(lengths[long].sum())
        return starts[~long], lengths[~long]
    if long_documents == "truncate":
        counts["truncated_documents"] += int(long.sum())
        counts["lost_tokens"] += int((lengths[long] - capacity).sum())
        return starts, np.minimum(lengths, capacity)
    counts["split_documents"] += int(long.sum())
    # A piece begins with the last token of the one before, so that every token is predicted.
    step = capacity - 1
    pieces = np.maximum(1, -(-(lengths - 1) // step))
    inner = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    cut_starts = np.repeat(starts, pieces) + inner * step
    ends = np.repeat(starts + lengths, pieces)
    return cut_starts, np.minimum(capacity, ends - cut_starts)


def _store(plan: RowPlan, folder: Path) -> None:
    """Write a plan as an entry of the cache, which the caller holds."""
    with new_entry(folder) as part:
        for name in ARRAYS:
            with open(part / f"{name}.npy", "wb") as file:
                np.save(file, getattr(plan, name))
                sync(file)
        write_json(part / "counts.json", asdict(plan.counts))
