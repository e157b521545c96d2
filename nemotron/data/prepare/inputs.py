"""Which files and data sets are read, and how they are shared out to units of work."""

import glob
import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron.data.folder import MANIFEST
from nemotron.data.prepare.hub import HUB, describe_hub
from nemotron.data.prepare.options import PrepareOptions
from nemotron.errors import UserError
from nemotron.outputs import MARK

COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
    ".text": "text",
}
"""How a file is read, by its ending; a file named by itself with another ending is text."""
FILES_OF_A_RUN = ("recipe.yaml", "metrics.jsonl")
"""By which the folder of a run is known."""
SMALLEST_UNIT = 8 << 20
"""Bytes of input that one process turns into one shard, if there is so much."""
MOST_UNITS = 4096
"""Larger inputs get larger shards, not more of them."""


@dataclass(frozen=True)
class Piece:
    """A part of one input: bytes of JSON lines, row groups of parquet, rows or parts of a data
    set, or a whole file (`start` 0, `stop` its size)."""

    kind: str
    path: str
    start: int
    stop: int
    size: int
    """Bytes on disk, for the progress."""


@dataclass(frozen=True)
class Unit:
    """What one process turns into one shard."""

    number: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(piece.size for piece in self.pieces)


@dataclass(frozen=True)
class Plan:
    """All units of a preparation, and the inputs by which it is known again."""

    units: tuple[Unit, ...]
    inputs: tuple[dict[str, Any], ...]  # Any: strings and numbers
    stamps: tuple[int, ...]
    """When each input was changed last; a resumed preparation refuses others."""
    files: tuple[Path, ...]
    """Every file that is read."""
    passed_over: tuple[str, ...] = ()
    """A sentence for each source that is a folder and holds files that are not read."""


def plan(sources: Sequence[str], options: PrepareOptions, outputs: Sequence[Path] = ()) -> Plan:
    """Find every input and cut them into units, the same ones on every machine.

    Of a source that is a folder, `outputs` inside it are not read.

    Raises:
        UserError: when a source does not exist, holds nothing readable or cannot be read, or when
            an option has no effect on any of them.
    """
    inputs: list[dict[str, Any]] = []
    stamps: list[int] = []
    pieces: list[Piece] = []
    files: list[str] = []
    passed_over: list[str] = []
    for source in sources:
        if source.startswith(HUB):
            facts, parts = describe_hub(source, options.hub)
            inputs.append(facts)
            stamps.append(0)
            pieces += [Piece("hub", source, *part) for part in parts]
        else:
            files += _files(source, outputs, passed_over)
    sizes = [_size(path) for path in files]
    known: set[str] = set()
    for path in files:
        if (real := os.path.realpath(path)) in known:
            raise UserError("is named twice; name each file once.", where=str(path))
        known.add(real)
    target = max(SMALLEST_UNIT, -(-sum(sizes) // MOST_UNITS))
    for path, size in zip(files, sizes, strict=True):
        inputs.append({"name": path, "bytes": size})
        stamps.append(os.stat(path).st_mtime_ns)
        pieces += _cut(path, size, target, options)
    _check_effects(pieces, options)
    return Plan(
        tuple(_units(pieces, target)),
        tuple(inputs),
        tuple(stamps),
        tuple(map(Path, files)),
        tuple(passed_over),
    )


def _check_effects(pieces: Sequence[Piece], options: PrepareOptions) -> None:
    """Refuse options of one kind of input where no input, or not every one, is of that kind."""
    kinds = {piece.kind for piece in pieces}
    if (changed := options.hub.model_dump(exclude_defaults=True)) and "hub" not in kinds:
        raise UserError(
            f"has no effect without a data set ({HUB}...); leave it out, or name one.",
            key=f"--{next(iter(changed))}",
        )
    if options.separator is not None and "text" not in kinds:
        raise UserError(
            "has no effect without a text file: each row is a document; leave it out.",
            key="--separator",
        )
    if options.column != PrepareOptions().column and options.chat is not None:
        raise UserError(
            "has no effect with --chat; name --messages.", key="--column", value=options.column
        )
    if options.column != PrepareOptions().column and kinds == {"text"}:
        raise UserError(
            "has no effect on text, which has no columns; leave it out.",
            key="--column",
            value=options.column,
        )
    text = next((piece.path for piece in pieces if piece.kind == "text"), None)
    if text is not None and options.filters:
        raise UserError(
            f"chooses among rows, but {text} is text without rows; name the other files.",
            key="--filter",
            value=options.filters[0],
        )


def is_text(path: str) -> bool:
    """Say whether a path names text to prepare, not tokens: neither a manifest nor a shard."""
    if path.startswith(HUB):
        return True
    if os.path.splitext(path)[1] in (".bin", ".idx") or os.path.exists(f"{path}.idx"):
        return False
    if not os.path.isdir(path):
        return os.path.isfile(path) or bool(glob.glob(path, recursive=True))
    folder = Path(path)
    if any(found.name == MANIFEST or found.suffix == ".idx" for found in _entries(folder)):
        return False
    return any(kind_of(str(found)) for found in _walk(folder, ()) if found.is_file())


def kind_of(path: str) -> str | None:
    """Return how a file is read, or None when its ending says nothing."""
    name = path.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return KINDS.get(os.path.splitext(name)[1])


def open_parquet(path: str) -> Any:  # Any: pyarrow has no types
    """Open a parquet file.

    Raises:
        UserError: when it is none.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        _ = file.schema_arrow.names, file.schema.names  # decoded only now
        return file
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise UserError(
            f"is not a readable parquet file: {' '.join(str(error).split())[:200]}", where=str(path)
        ) from None


def _files(source: str, outputs: Sequence[Path], passed_over: list[str]) -> Iterator[str]:
    if os.path.isdir(source):
        found = sorted(_walk(Path(source), {path.resolve() for path in outputs}))
        readable = [str(path) for path in found if path.is_file() and kind_of(str(path))]
        if not readable:
            raise UserError(
                f"contains no file to read ({', '.join(KINDS)}, also with "
                f"{' or '.join(COMPRESSED)}); name the files one by one to read them as text.",
                where=source,
            )
        if others := [path for path in found if str(path) not in set(readable)]:
            passed_over.append(f"{source}: {_others(others)}")
        yield from readable
        return
    if os.path.isfile(source):
        yield source
        return
    matched = sorted(path for path in glob.glob(source, recursive=True) if os.path.isfile(path))
    if not matched:
        raise UserError(
            f"does not exist; name files, folders or patterns, or a data set of the hub "
            f"as {HUB}owner/name.",
            where=source,
        )
    yield from matched


def _others(paths: Sequence[Path]) -> str:
    """Say of what kinds the files of a folder are that are not read."""
    kinds = Counter(
        "links to folders or to nothing" if not path.is_file() else path.suffix or "without ending"
        for path in paths
    )
    listed = ", ".join(f"{number:,} {kind}" for kind, number in kinds.most_common(8))
    return f"not read: {listed}; files that a pattern such as '*.rst' names are read as text"


def _walk(folder: Path, outputs: Collection[Path]) -> Iterator[Path]:
    """Yield the files below a folder, but those of outputs and of what begins with a dot.

    Nor are other folders read that this program wrote: prepared data, exports and runs. A link
    that leads to no file is yielded as it is.

    Raises:
        UserError: when a folder cannot be read.
    """
    for path in _entries(folder):
        if path.name.startswith("."):
            continue
        if path.is_file() or path.is_symlink():
            yield path
        elif path.is_dir() and path.resolve() not in outputs and not _is_ours(path):
            yield from _walk(path, outputs)


def _entries(folder: Path) -> list[Path]:
    if not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(
            "cannot be read: Permission denied; make the folder readable.", where=str(folder)
        )
    return list(folder.iterdir())


def _is_ours(folder: Path) -> bool:
    return (folder / MARK).exists() or all((folder / name).exists() for name in FILES_OF_A_RUN)


def _size(path: str) -> int:
    try:
        # a pipe that nobody writes would block the call
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}.", where=path, because=error) from None
    try:
        found = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise UserError("is not a regular file; write its content into one.", where=path)
    return found.st_size


def _cut(path: str, size: int, target: int, options: PrepareOptions) -> Iterator[Piece]:
    """Yield pieces of a file that can be read independently of each other."""
    kind = kind_of(path) or "text"
    if kind == "text" and not options.adds_ends:
        what = "conversations" if options.chat else "pairs"
        raise UserError(f"is text; {what} are read from JSON lines and parquet.", where=str(path))
    if kind == "parquet":
        groups = open_parquet(path).metadata
        for number in range(groups.num_row_groups):
            group = groups.row_group(number)
            stored = sum(group.column(i).total_compressed_size for i in range(group.num_columns))
            yield Piece(kind, path, number, number + 1, stored)
    elif kind == "jsonl" and not path.lower().endswith(COMPRESSED):
        for start in range(0, size, target):
            stop = min(start + target, size)
            yield Piece(kind, path, start, stop, stop - start)
    else:
        yield Piece(kind, path, 0, size, size)


def _units(pieces: Sequence[Piece], target: int) -> Iterator[Unit]:
    """Yield units of neighboring pieces; each part of a data set is a unit of its own."""
    gathered: list[Piece] = []
    number = size = 0
    for piece in pieces:
        if gathered and (size + piece.size > target or "hub" in (piece.kind, gathered[0].kind)):
            yield Unit(number, tuple(gathered))
            number, gathered, size = number + 1, [], 0
        gathered.append(piece)
        size += piece.size
    if gathered:
        yield Unit(number, tuple(gathered))
