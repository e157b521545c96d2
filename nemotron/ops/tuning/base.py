"""The tuning base: one JSON file per architecture, written by `python -m nemotron.tune`.

`sm90.json` beside this file ships with the package; a file of the same form in the user's cache
folder wins, which XDG_CACHE_HOME may place elsewhere. Without either, kernels launch with the
defaults in their modules, only slower. Parameters are how many warps, stages and programs there
are and how much each of them takes: the numbers of a run stay the same, but for the order in which
some float32 sums are taken, as on another GPU. `Tunable.reorders` names the parameters that can
change it; one base gives the same bits each time.
"""

import functools
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationError

from nemotron.errors import UserError
from nemotron.files import write_text
from nemotron.section import Section

FARTHEST = 3
"""Buckets, that is powers of two, between an entry and a shape, along any axis, at most: what was
found for thousands of tokens says nothing about one."""

Binds = Literal["memory", "compute", "latency"]
Positive = Annotated[int, Field(gt=0)]


class Entry(Section):
    """The best launch that was found for a kernel, a bucket of shapes and a dtype."""

    operation: str
    launch: str
    """Which of the operation's launches."""
    axes: dict[str, Positive]
    """Sizes, rounded up to powers of two."""
    dtype: str
    configuration: dict[str, Positive]
    time_us: float = Field(gt=0)
    """Median of the repetitions."""
    default_us: float = Field(gt=0)
    """The same of the default in code, in the same run."""
    floor_us: float = Field(gt=0)
    """What the launch's bytes and FLOPs take at the rates that the device reached."""
    binds: Binds
    """What the floor comes from; latency where it is a few microseconds."""
    error: float = Field(ge=0)
    """Largest difference from the default's results, relative, in norm."""
    registers: int = Field(ge=0)
    shared_bytes: int = Field(ge=0)
    device: str
    triton: str
    torch: str
    date: str
    commit: str
    repetitions: Positive


class Lesson(Section):
    """What was tried, and what came of it: one sentence."""

    operation: str
    launch: str
    axes: dict[str, Positive]
    dtype: str
    text: str
    device: str
    triton: str
    date: str
    commit: str


class Base(Section):
    """All that is known about one architecture."""

    version: Literal[1] = 1
    architecture: str
    entries: tuple[Entry, ...] = ()
    lessons: tuple[Lesson, ...] = ()


def shipped_file(architecture: str) -> Path:
    """Return the file that comes with the package."""
    return Path(__file__).with_name(f"{architecture}.json")


def user_file(architecture: str) -> Path:
    """Return the file of this user, which need not exist."""
    return user_folder() / "tuning" / f"{architecture}.json"


def user_folder() -> Path:
    """Return the folder of what this project keeps for a user and can make again."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "nemotron"


def read(path: Path, architecture: str) -> Base:
    """Read a file; one that is not there holds nothing.

    Raises:
        UserError: when it is not such a file, or of another architecture.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        return Base(architecture=architecture)
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"cannot be read ({problem}); delete it.", where=str(path)) from None
    try:
        found = Base.model_validate_json(text)
    except ValidationError as problem:
        first = problem.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{where}: {first['msg']}; delete the file, or tune again.", where=str(path)
        ) from None
    if found.architecture != architecture:
        rule, value = f"is not {architecture}; delete the file.", found.architecture
        raise UserError(rule, key="architecture", value=value, where=str(path))
    return found


def write(path: Path, base: Base) -> None:
    """Write a file, an entry a line, so that a change of one shows as that."""
    head = base.model_dump(exclude={"entries", "lessons"})
    lines = [f'  "{name}": {json.dumps(value)},' for name, value in head.items()]
    for name, items in (("entries", base.entries), ("lessons", base.lessons)):
        rows = [f"    {item.model_dump_json()}" for item in items]
        lines.append(f'  "{name}": [' + ("\n" + ",\n".join(rows) + "\n  ]" if rows else "]") + ",")
    lines[-1] = lines[-1].removesuffix(",")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "{\n" + "\n".join(lines) + "\n}\n")


def architecture_of(device: torch.device) -> str | None:
    """Return the name under which a device is known; None for one without Triton kernels."""
    if device.type == "cuda":
        return _capability(device.index)
    return _assumed.get()


@functools.cache
def _capability(index: int | None) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm{major}{minor}"


_assumed: ContextVar[str | None] = ContextVar("assumed architecture", default=None)


@contextmanager
def assume(architecture: str) -> Iterator[None]:
    """Let tensors that are on no GPU be launched as on this architecture: to compile, to test."""
    token = _assumed.set(architecture)
    try:
        yield
    finally:
        _assumed.reset(token)


def bucket(size: int) -> int:
    """Return the exponent of the power of two that a size is rounded up to."""
    return (size - 1).bit_length()


Key = tuple[str, str, str]
"""Operation, launch, dtype."""
Known = Mapping[Key, Sequence[tuple[Mapping[str, int], Mapping[str, int]]]]
"""By key, the buckets' exponents by axis and the configuration, the user's first."""


@functools.cache
def known(architecture: str) -> Known:
    """Return what both files hold; a damaged one of the user's is left out with a warning."""
    found: dict[Key, list[tuple[Mapping[str, int], Mapping[str, int]]]] = {}
    bases = []
    try:
        bases.append(read(user_file(architecture), architecture))
    except UserError as problem:
        warnings.warn(f"tuning is left out: {problem}", stacklevel=2)
    bases.append(read(shipped_file(architecture), architecture))
    for base in bases:
        for entry in base.entries:
            place = found.setdefault((entry.operation, entry.launch, entry.dtype), [])
            buckets = {axis: bucket(size) for axis, size in entry.axes.items()}
            place.append((buckets, entry.configuration))
    return found


def nearest(
    architecture: str, key: Key, buckets: Mapping[str, int]
) -> list[tuple[int, Mapping[str, int]]]:
    """Return the distance and the configuration of entries that are near, the nearest first."""
    found = []
    for place, configuration in known(architecture).get(key, ()):
        if place.keys() != buckets.keys():
            continue  # of another version of the kernel
        distances = [abs(place[axis] - own) for axis, own in buckets.items()]
        if max(distances, default=0) <= FARTHEST:
            found.append((sum(distances), configuration))
    return sorted(found, key=lambda pair: pair[0])
