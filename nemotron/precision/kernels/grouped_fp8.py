"""Products of experts' rows in FP8: one launch for all experts, whose counts the device knows.

torch's grouped product takes E4M3 alone and a scale a row; gradients are E5M2, and blocks have
scales of their own. Tiles of 128 by 128 by 128 come by Hopper's bulk copies and lie as the tensor
cores read them: the contracted dimension is contiguous on both sides.
"""

from typing import Any

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nemotron.ops.grouped_linear.tiles import TILE, Plan, locate
from nemotron.ops.launch import INTERPRETED, Launcher, power_of_2
from nemotron.ops.tuning.tunable import Tunable
from nemotron.precision.kernels.quantize_fp8 import Codes

BULK = True
"""Whether tiles come by bulk copies (TMA), or by loads of each thread."""
WIDE_COLUMNS = 256
"""Columns of a tile whose sums stay in the tensor cores: a quarter less is read for a product."""
WASTE = 1.07
"""By how much columns may be rounded up to wide tiles: more costs as much as they gain."""


@triton.jit
def _tile(source, row, column, rows, stride, BULK: tl.constexpr, WIDE: tl.constexpr,
          HEIGHT: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Load the codes of a tile; the interpreter multiplies them as float32."""
    if BULK:
        codes = source.load([row, column])
    else:
        lane = tl.arange(0, HEIGHT)
        beside = column + tl.arange(0, TILE)
        at = (row + lane).to(tl.int64)[:, None] * stride + beside[None, :]
        codes = tl.load(source + at, mask=(row + lane < rows)[:, None])
    if WIDE:
        codes = codes.to(tl.float32)
    return codes


@triton.jit
def _by_rows(a, b, a_scales, b_scales, out, bounds, rows, columns, contracted,
             a_stride, b_rows, a_scale_stride, b_scale_high, b_scale_wide, out_stride,
             GROUPS: tl.constexpr, SIZE: tl.constexpr, PLANNED: tl.constexpr,
             IN_BLOCKS: tl.constexpr, FAST: tl.constexpr, BULK: tl.constexpr,
             WIDE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    block, tile = tl.program_id(0), tl.program_id(1)
    group, _, first, end = locate(tile, bounds, rows, GROUPS, SIZE, PLANNED, TILE)
    if group > GROUPS:
        return
    lane = tl.arange(0, TILE)
    row, column = first + lane, block * WIDTH + tl.arange(0, WIDTH)
    # rows of no expert become zeros
    held = tl.minimum(group, GROUPS - 1)
    steps = tl.where(group < GROUPS, contracted // TILE, 0)
    b_row = held * b_rows + block * WIDTH
    sums = tl.zeros([TILE, WIDTH], tl.float32)
    for step in range(steps):
        left = _tile(a, first, step * TILE, rows, a_stride, BULK, WIDE, TILE, TILE)
        right = _tile(b, b_row, step * TILE, b_row + WIDTH, contracted, BULK, WIDE, WIDTH, TILE)
        if IN_BLOCKS:
            part = tl.dot(left, right.T, input_precision="ieee")
            at = a_scales + step * a_scale_stride + row
            across = tl.load(at, mask=row < end, other=0.0)
            down = tl.load(b_scales + (held * b_scale_high + block) * b_scale_wide + step)
            sums += part * (across * down)[:, None]
        elif FAST:
            sums = tl.dot(left, right.T, sums, input_precision="ieee")
        else:
            sums += tl.dot(left, right.T, input_precision="ieee")
    if not IN_BLOCKS:
        scale = tl.load(a_scales + held) * tl.load(b_scales + held)
        sums = tl.where(group < GROUPS, sums * scale, 0.0)
    at = row.to(tl.int64)[:, None] * out_stride + column[None, :]
    mask = (row < end)[:, None] & (column < columns)[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _by_experts(a, b, a_scales, b_scales, out, bounds, high, wide, a_high, b_high, stride,
                GROUPS: tl.constexpr, IN_BLOCKS: tl.constexpr, BULK: tl.constexpr,
                WIDE: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    across, down, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(bounds + GROUPS + 2 + group)
    last = tl.load(bounds + GROUPS + 3 + group)
    lane = tl.arange(0, TILE)
    row, column = down * TILE + lane, across * TILE + lane
    sums = tl.zeros([TILE, TILE], tl.float32)
    for tile in range(first, last):
        left = _tile(a, down * TILE, tile * TILE, a_high, stride, BULK, WIDE, TILE, TILE)
        right = _tile(b, across * TILE, tile * TILE, b_high, stride, BULK, WIDE, TILE, TILE)
        part = tl.dot(left, right.T, input_precision="ieee")
        if IN_BLOCKS:
            left_scale = tl.load(a_scales + tile * a_high + row)
            right_scale = tl.load(b_scales + tile * b_high + column)
            sums += part * left_scale[:, None] * right_scale[None, :]
        else:
            sums += part
    if not IN_BLOCKS:
        # an expert without rows has no scale
        scale = tl.load(a_scales + group) * tl.load(b_scales + group)
        sums *= tl.where(first < last, scale, 0.0)
    at = (group.to(tl.int64) * high + row)[:, None] * wide + column[None, :]
    mask = (row < high)[:, None] & (column < wide)[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=mask)


_by_rows_on, _by_experts_on = Launcher(_by_rows), Launcher(_by_experts)


AXES = ("groups", "rows", "columns", "contracted")
# 8 warps are two groups of four, each with the sums of 64 rows: 64 registers a thread, and 64 for a
# part; four stages are 128 KiB of tiles on their way
BY_ROWS, BY_ROWS_WIDE, BY_ROWS_NARROW, BY_EXPERTS = (
    Tunable(
        "grouped_fp8",
        launch,
        (kernel,),
        AXES,
        {"warps": 8, "stages": stages},
        {"warps": (4, 8), "stages": (2, 3, 4, 5, 6)},
    )
    for launch, kernel, stages in (
        ("by_rows", _by_rows, 4),
        ("by_rows_wide", _by_rows, 4),
        # sums that stay in the tensor cores take few registers: two programs, of 96 KiB each, fit
        ("by_rows_narrow", _by_rows, 3),
        ("by_experts", _by_experts, 4),
    )
)


def multiply(
    rows: Codes,
    matrices: Codes,
    plan: Plan | None,
    out: Float[Tensor, "R N"],
    *,
    in_blocks: bool,
    fast: bool,
) -> None:
    """Write each expert's rows times its matrix, transposed, into `out`; other rows become 0.

    Without a plan all rows are one matrix's. Both sides are padded to tiles. `fast` leaves all
    sums to the tensor cores, which keep about 14 bits of them; else each 128 products are added up
    in float32.
    """
    groups = 1 if plan is None else plan.groups
    a, b = rows.elements, matrices.elements.flatten(0, -2)
    columns = out.shape[1]
    assert a.shape[1] == b.shape[1], (a.shape, b.shape)
    assert a.shape[1] % TILE == 0, a.shape
    b_rows = b.shape[0] // groups
    b_scales = matrices.scale_inv
    # what is not planned has rows that only fill up
    tiles = -(-out.shape[0] // TILE) if plan is None else plan.tiles
    bounds = b_scales if plan is None else plan.bounds
    wide = -(-columns // WIDE_COLUMNS) * WIDE_COLUMNS
    width = WIDE_COLUMNS if fast and not in_blocks and wide <= WASTE * columns else TILE
    tunable = BY_ROWS
    if fast and not in_blocks:
        tunable = BY_ROWS_NARROW if width == TILE else BY_ROWS_WIDE
    launch = tunable.at(a, groups, out.shape[0], columns, a.shape[1])
    _by_rows_on(
        (-(-columns // width), tiles, 1),
        (_source(a, TILE), _source(b, width), rows.scale_inv, b_scales, out, bounds),
        (out.shape[0], columns, a.shape[1], a.stride(0), b_rows, rows.scale_inv.stride(0),
         b_scales.shape[1] if in_blocks else 0, b_scales.shape[2] if in_blocks else 0,
         out.stride(0)),
        (groups, power_of_2(groups + 2), plan is not None, in_blocks, fast, _is_bulk(),
         INTERPRETED, width, TILE),
        num_warps=launch["warps"], num_stages=launch["stages"],
    )  # fmt: skip


def multiply_columnwise(
    left: Codes, right: Codes, plan: Plan, out: Float[Tensor, "G N K"], *, in_blocks: bool
) -> None:
    """Write the sum over each expert's rows of their outer products into `out`; 0 without rows."""
    groups, high, wide = out.shape
    a, b = left.elements, right.elements
    launch = BY_EXPERTS.at(a, groups, a.shape[1], wide, high)
    _by_experts_on(
        (-(-wide // TILE), -(-high // TILE), groups),
        (_source(a, TILE), _source(b, TILE), left.scale_inv, right.scale_inv, out, plan.bounds),
        (high, wide, a.shape[0], b.shape[0], a.stride(0)),
        (groups, in_blocks, _is_bulk(), INTERPRETED, TILE),
        num_warps=launch["warps"], num_stages=launch["stages"],
    )  # fmt: skip


def _is_bulk() -> bool:
    return BULK and not INTERPRETED


def _source(codes: Float[Tensor, "rows contracted"], height: int) -> Any:
    """Return what a kernel loads tiles from: a description for bulk copies, or the tensor."""
    if _is_bulk():
        return TensorDescriptor.from_tensor(codes, [height, TILE])
    return codes
