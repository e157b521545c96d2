"""Converting checkpoints of the old layout, whose index was a pickle, once."""

import mmap
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import NonNegativeInt, TypeAdapter, ValidationError
from torch import Tensor

from nemotron.checkpoint import pickled
from nemotron.checkpoint.draft import Draft, tensor_file
from nemotron.checkpoint.housekeeping import new_partial
from nemotron.checkpoint.index import DTYPES, NAMES, Index, SavedPiece, SavedTensor, key_of, tiles
from nemotron.checkpoint.manifest import (
    MODEL,
    OLD_FORMAT,
    STATE,
    STEP_FOLDER,
    Files,
    Manifest,
    OldCheckpoint,
    compare_files,
    folder_name,
    read_manifest,
    steps,
    verify,
)
from nemotron.checkpoint.read import parse_model_config
from nemotron.checkpoint.records import DamagedCheckpoint, explain, read_record
from nemotron.checkpoint.state import SavedState
from nemotron.checkpoint.tensor_file import write_tensor_file
from nemotron.checkpoint.write import rename, write_records
from nemotron.errors import UserError
from nemotron.section import Section
from nemotron.terminal import print_text

TORCH_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in NAMES}

SUFFIX = ".old-format"
"""End of the name that an old checkpoint keeps beside the converted one."""

TIMEOUT_S = 1800


class OldPiece(Section):
    """Where the bytes of a rectangle lie; `first` and `strides` count elements."""

    file: str
    start: NonNegativeInt
    num_bytes: NonNegativeInt
    offsets: tuple[NonNegativeInt, ...]
    shape: tuple[NonNegativeInt, ...]
    first: NonNegativeInt
    strides: tuple[NonNegativeInt, ...]


class OldTensor(Section):
    """A tensor of the old layout; `dtype` is torch's name of it."""

    dtype: str
    shape: tuple[NonNegativeInt, ...]
    pieces: tuple[OldPiece, ...]


class OldIndex(Section):
    """What the isolated reader prints."""

    tensors: dict[str, OldTensor]


@dataclass(frozen=True)
class Plan:
    """The index of the new checkpoint, and which old pieces each of its files is made of."""

    index: Index
    files: dict[str, dict[str, tuple[str, OldPiece]]]
    """By file and key: the dtype's name and the piece."""


def convert(path: Path, out: Path | None) -> int:
    """Convert a checkpoint, or every old one of a run; returns 0, or 1 if one is damaged.

    A converted checkpoint takes the name of the old one, which stays beside it under another name.
    With `out` it is written into that folder, and the old one stays as it is.

    Raises:
        UserError: when there is no old checkpoint.
    """
    found = _old_checkpoints(path)
    if not found:
        raise UserError(
            "contains no checkpoint of the old format; nothing is to be done.", where=str(path)
        )
    code = 0
    for folder in found:
        try:
            target = _convert(folder, out or folder.parent)
        except DamagedCheckpoint as damage:
            print_text(f"{folder} is damaged: {damage}; it is left as it is")
            code = 1
        except OSError as error:
            raise UserError(
                f"cannot be converted: {error.strerror or error}; it is left as it is.",
                where=str(folder),
                because=error,
            ) from error
        else:
            print_text(f"converted {folder} to {target}")
            if out is None:
                print_text(
                    f"the old one is {_aside(folder)}; remove it when the new one serves you"
                )
    return code


def _old_checkpoints(path: Path) -> list[Path]:
    if not path.is_dir():
        raise UserError("is not a folder; give a run or a checkpoint.", where=str(path.absolute()))
    if STEP_FOLDER.fullmatch(path.name):
        folders = [path]
    else:
        home = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        for aside in home.glob(f"step-*{SUFFIX}"):
            # a conversion was killed between its two renames
            if not (target := aside.with_name(aside.name.removesuffix(SUFFIX))).exists():
                aside.rename(target)
        folders = [home / folder_name(step) for step in reversed(steps(home))]
    return [folder for folder in folders if _is_old(folder)]


def _is_old(folder: Path) -> bool:
    try:
        verify(folder, content=False)
    except OldCheckpoint:
        return True
    except DamagedCheckpoint:
        return False
    return False


def _convert(folder: Path, out: Path) -> Path:
    """Write one checkpoint in the new layout; returns its folder."""
    manifest = read_manifest(folder, OLD_FORMAT)
    compare_files(folder, manifest, list(manifest.files))
    for name in (MODEL, STATE, ".metadata"):
        if name not in manifest.files:
            raise DamagedCheckpoint(f"the manifest does not list {name}")
    config = parse_model_config(folder / MODEL)
    state = read_record(folder / STATE, SavedState)
    plan = plan_conversion(read_old_index(folder), manifest)
    out.mkdir(parents=True, exist_ok=True)
    target = out / folder_name(manifest.step)
    in_place = target.resolve() == folder.resolve()
    for taken in [_aside(folder)] if in_place else [target]:
        if taken.exists():
            raise UserError("exists already; move it away.", where=str(taken))
    draft = Draft(target, manifest.step, new_partial(out, manifest.step), plan.index)
    try:
        files: Files = {
            name: write_tensor_file(draft.partial / name, _tensors(folder, pieces))
            for name, pieces in plan.files.items()
        }
        write_records(draft, files, state, config)
        if in_place:
            folder.rename(_aside(folder))
        rename(draft)
    except BaseException:
        shutil.rmtree(draft.partial, ignore_errors=True)
        raise
    return target


def read_old_index(folder: Path) -> OldIndex:
    """Return the index that a process of its own, without torch, prints about a folder.

    Raises:
        DamagedCheckpoint: when it refuses the files.
    """
    command = [sys.executable, "-I", "-S", pickled.__file__, str(folder)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S, check=False
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").splitlines() or [".metadata cannot be read"]
        raise DamagedCheckpoint(said[-1][:300])
    try:
        return TypeAdapter(OldIndex).validate_json(done.stdout)
    except ValidationError as error:
        raise DamagedCheckpoint(f".metadata: {explain(error)}") from None


def plan_conversion(old: OldIndex, manifest: Manifest) -> Plan:
    """Give each old file a new one.

    Raises:
        DamagedCheckpoint: when pieces lie outside their files or do not make up their tensors.
    """
    names = {
        name: tensor_file(number)
        for number, name in enumerate(sorted(n for n in manifest.files if n.endswith(".distcp")))
    }
    tensors: dict[str, SavedTensor] = {}
    files: dict[str, dict[str, tuple[str, OldPiece]]] = defaultdict(dict)
    for name, tensor in old.tensors.items():
        dtype = TORCH_NAMES.get(tensor.dtype)
        if dtype is None:
            raise DamagedCheckpoint(f".metadata: {name} has the dtype {tensor.dtype!r}")
        pieces = [piece for piece in tensor.pieces if 0 not in piece.shape]
        for piece in pieces:
            _check_piece(name, piece, dtype.itemsize, manifest, names)
            files[names[piece.file]][key_of(name, piece.offsets)] = (NAMES[dtype], piece)
        if not tiles(tensor.shape, [(piece.offsets, piece.shape) for piece in pieces]):
            raise DamagedCheckpoint(f".metadata: the pieces of {name} do not make up its shape")
        saved = [
            SavedPiece(file=names[piece.file], offsets=piece.offsets, shape=piece.shape)
            for piece in pieces
        ]
        tensors[name] = SavedTensor(dtype=NAMES[dtype], shape=tensor.shape, pieces=tuple(saved))
    return Plan(Index(tensors=tensors), files)


def _check_piece(
    name: str, piece: OldPiece, itemsize: int, manifest: Manifest, names: dict[str, str]
) -> None:
    if piece.file not in names:
        raise DamagedCheckpoint(
            f".metadata points to {piece.file[:80]!r}, which the manifest does not list"
        )
    ranks = len(piece.shape), len(piece.strides), len(piece.offsets)
    last = piece.first + sum(
        (n - 1) * stride for n, stride in zip(piece.shape, piece.strides, strict=False)
    )
    too_many = (last + 1) * itemsize > piece.num_bytes or piece.num_bytes % itemsize
    if len(set(ranks)) != 1 or too_many:
        raise DamagedCheckpoint(f".metadata: {name} has other elements than bytes")
    if piece.start + piece.num_bytes > manifest.files[piece.file].bytes:
        raise DamagedCheckpoint(f".metadata: {name} lies beyond the end of {piece.file}")


def _tensors(folder: Path, pieces: dict[str, tuple[str, OldPiece]]) -> dict[str, Tensor]:
    """Return the pieces of one old file, which stays mapped into memory."""
    [name] = {piece.file for _, piece in pieces.values()}
    with open(folder / name, "rb") as file:
        # a private map can be written, which torch asks for; the file cannot
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {}
    for key, (dtype, piece) in pieces.items():
        data = memoryview(content)[piece.start : piece.start + piece.num_bytes]
        flat = torch.frombuffer(data, dtype=DTYPES[dtype])
        tensors[key] = flat.as_strided(piece.shape, piece.strides, piece.first)
    return tensors


def _aside(folder: Path) -> Path:
    return folder.with_name(folder.name + SUFFIX)
