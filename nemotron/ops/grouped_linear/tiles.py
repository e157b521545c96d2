"""Tiles of experts' rows, for kernels: the device alone knows how many rows each expert has."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Int

from nemotron.ops.launch import Launcher, power_of_2

TILE = 128
"""Rows of a tile."""


class Plan(NamedTuple):
    """Where the rows of each expert are, on the device.

    Each expert's rows are cut into tiles, of which the last is partial. Rows that no expert has are
    the last, and have tiles as well.
    """

    bounds: Int[torch.Tensor, "2 G+2"]
    """First row, and first tile, of each expert, of the rows left over, and of what is behind."""
    groups: int
    rows: int

    @property
    def tiles(self) -> int:
        """The most tiles that there can be."""
        return most_tiles(self.rows, self.groups)


@triton.jit
def _plan(counts, bounds, rows, GROUPS: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr):
    group = tl.arange(0, SIZE)
    count = tl.load(counts + group, mask=group < GROUPS, other=0).to(tl.int32)
    count = tl.where(group == GROUPS, rows - tl.sum(count, 0), count)
    tiles = (count + TILE - 1) // TILE
    first_row = tl.cumsum(count, 0) - count
    first_tile = tl.cumsum(tiles, 0) - tiles
    tl.store(bounds + group, first_row, mask=group < GROUPS + 2)
    tl.store(bounds + GROUPS + 2 + group, first_tile, mask=group < GROUPS + 2)


@triton.jit
def locate(tile, bounds, each, GROUPS: tl.constexpr, SIZE: tl.constexpr, PLANNED: tl.constexpr,
           TILE: tl.constexpr):  # fmt: skip
    """Return a tile's group, its place among the group's tiles, its first row, and the last's end.

    The group is GROUPS for rows that no expert has, and more behind them. What is not `PLANNED` has
    `each` rows in every group.
    """
    if PLANNED:
        index = tl.arange(0, SIZE)
        ends = tl.load(bounds + GROUPS + 3 + index, mask=index < GROUPS + 1, other=0x7FFFFFFF)
        group = tl.sum((ends <= tile).to(tl.int32), 0)
        held = tl.minimum(group, GROUPS)
        place = tile - tl.load(bounds + GROUPS + 2 + held)
        first = tl.load(bounds + held) + place * TILE
        end = tl.load(bounds + held + 1)
    else:
        tiles = (each + TILE - 1) // TILE
        group = tile // tiles
        place = tile % tiles
        first = group * each + place * TILE
        end = (group + 1) * each
    return group, place, first, end


_plan_on = Launcher(_plan)


def plan(counts: Int[torch.Tensor, " G"], rows: int) -> Plan:
    """Return where the rows of each expert are, without a look at the counts from the host."""
    groups = counts.shape[0]
    bounds = torch.empty(2, groups + 2, dtype=torch.int32, device=counts.device)
    constants = (groups, power_of_2(groups + 2), TILE)
    _plan_on((1, 1, 1), (counts, bounds), (rows,), constants, num_warps=4)
    return Plan(bounds, groups, rows)


def most_tiles(rows: int, experts: int) -> int:
    """Return the most tiles that so many rows can have: the device knows how many there are."""
    return (rows + (TILE - 1) * (experts + 1)) // TILE
