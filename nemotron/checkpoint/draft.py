"""A checkpoint that is being written: where, and which rank writes which piece."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from nemotron.checkpoint.index import NAMES, Index, SavedPiece, SavedTensor, tiles
from nemotron.parallel.runtime import Ranks
from nemotron.parallel.shards import Offsets, local_shards


@dataclass(frozen=True)
class Held:
    """What a rank holds of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    pieces: dict[Offsets, tuple[int, ...]]
    """Shapes by the place of their first element in the whole."""


@dataclass(frozen=True)
class Draft:
    """A checkpoint that is written in a folder beside the one that it will be."""

    target: Path
    step: int
    partial: Path
    index: Index


def tensor_file(rank: int) -> str:
    """Return the name of the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def plan_index(tensors: dict[str, Tensor], ranks: Ranks) -> Index:
    """Choose who writes what: of the ranks that hold a piece, the one that writes the least so far.

    Called by every rank; all of them get the same.
    """
    mine = {name: _held(tensor) for name, tensor in tensors.items()}
    everyone = ranks.gather(mine)
    load = [0] * ranks.world
    of_tensor: dict[str, dict[int, Held]] = defaultdict(dict)
    for rank, held in enumerate(everyone):
        for name, tensor in held.items():
            of_tensor[name][rank] = tensor
    return Index(tensors={name: _plan(name, held, load) for name, held in of_tensor.items()})


def _held(tensor: Tensor) -> Held:
    shapes = {at: tuple(shard.shape) for at, shard in local_shards(tensor).items()}
    return Held(NAMES[tensor.dtype], tuple(tensor.shape), shapes)


def _plan(name: str, held: dict[int, Held], load: list[int]) -> SavedTensor:
    """Share the pieces of a tensor out; `load` has the bytes of each rank so far."""
    first = next(iter(held.values()))
    holders: dict[Offsets, list[int]] = defaultdict(list)
    for rank, tensor in held.items():
        for offsets in tensor.pieces:
            holders[offsets].append(rank)
    pieces = []
    for offsets, some in holders.items():
        writer = min(some, key=lambda rank: (load[rank], rank))
        shape = held[writer].pieces[offsets]
        piece = SavedPiece(file=tensor_file(writer), offsets=offsets, shape=shape)
        load[writer] += SavedTensor(dtype=first.dtype, shape=shape, pieces=()).num_bytes
        pieces.append(piece)
    assert tiles(first.shape, [(p.offsets, p.shape) for p in pieces]), f"{name}: {pieces}"
    return SavedTensor(dtype=first.dtype, shape=first.shape, pieces=tuple(pieces))
