"""Which tensors a checkpoint holds, and which pieces of them lie in which file."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable
from typing import Annotated

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, StringConstraints

from nemotron.checkpoint.manifest import INDEX, TENSOR_FILE, CheckpointInfo
from nemotron.checkpoint.records import DamagedCheckpoint, read_record
from nemotron.section import Section

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of dtypes in safetensors files."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_DIMS = 5

Offsets = Annotated[tuple[NonNegativeInt, ...], Field(max_length=MAX_DIMS)]
Shape = Annotated[tuple[NonNegativeInt, ...], Field(max_length=MAX_DIMS)]


class SavedPiece(Section):
    """A rectangle of a tensor."""

    file: Annotated[str, StringConstraints(pattern=f"^{TENSOR_FILE.pattern}$")]
    offsets: Offsets
    """Place of its first element in the whole tensor."""
    shape: Annotated[tuple[PositiveInt, ...], Field(max_length=MAX_DIMS)]


class SavedTensor(Section):
    """A tensor, cut into pieces; none if it has no elements."""

    dtype: Annotated[str, StringConstraints(pattern=f"^({'|'.join(DTYPES)})$")]
    shape: Shape
    pieces: tuple[SavedPiece, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the whole tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class Index(Section):
    """The content of `index.json`."""

    tensors: dict[str, SavedTensor]

    def dump(self) -> str:
        """Return the index as JSON with a line for each tensor."""
        lines = (
            f"{json.dumps(name)}: {tensor.model_dump_json()}"
            for name, tensor in self.tensors.items()
        )
        return '{"tensors": {\n' + ",\n".join(lines) + "\n}}\n"


def key_of(name: str, offsets: tuple[int, ...]) -> str:
    """Return the name of a piece in its file: that of the tensor and, after @, its place."""
    return f"{name}@{','.join(map(str, offsets))}" if any(offsets) else name


def read_index(info: CheckpointInfo) -> Index:
    """Return the index of a verified checkpoint.

    Raises:
        DamagedCheckpoint: when it names a file that the manifest does not list, or pieces that do
            not cover their tensor exactly once, or more bytes than the files have.
    """
    index = read_record(info.folder / INDEX, Index)
    for name, tensor in index.tensors.items():
        for piece in tensor.pieces:
            if piece.file not in info.files:
                raise DamagedCheckpoint(
                    f"{INDEX} points to {piece.file!r}, which the manifest does not list"
                )
        boxes = [(piece.offsets, piece.shape) for piece in tensor.pieces]
        if not tiles(tensor.shape, boxes):
            raise DamagedCheckpoint(
                f"{INDEX}: tensors.{name}.pieces do not cover the shape {list(tensor.shape)} once"
            )
    named = sum(tensor.num_bytes for tensor in index.tensors.values())
    if named > (stored := sum(entry.bytes for entry in info.files.values())):
        raise DamagedCheckpoint(
            f"{INDEX} names tensors of {named:,} bytes, but the files have {stored:,}"
        )
    return index


def tiles(shape: tuple[int, ...], boxes: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Say whether boxes, given by offsets and shape, cover the whole shape exactly once.

    A sum of boxes is determined by its corners, counted with alternating signs: those of the boxes
    must be those of the whole. It takes a time proportional to the number of boxes.
    """
    corners: Counter[tuple[int, ...]] = Counter()
    for sign, offsets, sizes in [
        (-1, (0,) * len(shape), shape),
        *((1, offsets, sizes) for offsets, sizes in boxes),
    ]:
        if not len(offsets) == len(sizes) == len(shape):
            return False
        for far in itertools.product((0, 1), repeat=len(shape)):
            corner = tuple(o + s * f for o, s, f in zip(offsets, sizes, far, strict=True))
            corners[corner] += sign * (-1) ** sum(far)
    return not any(corners.values())
