"""Matrices into FP8 on a GPU: one read writes the codes along both directions, and their scales.

A tile of 128 by 128 elements is a program's. Tensors lie one under another: matrices of equal size
(a single one, or the stacked weights of experts), or the rows of each expert, whose numbers only
the device knows (`Plan`). A tile is a block of FP8 with block scales. Codes are those of
`nemotron.precision.fp8`, to the bit.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from nemotron.ops.grouped_linear.tiles import TILE, Plan, locate, most_tiles
from nemotron.ops.launch import INTERPRETED, Launcher, power_of_2
from nemotron.ops.tuning.tunable import Tunable
from nemotron.precision.formats import E4M3, FP8

PARTS = 2048
"""Magnitudes of tiles that are read at once for the largest of a tensor."""
BY_AMAX, BY_SCALE, BY_ROWS, BY_SQUARES, BY_PARTS = range(5)
"""Where scales come from: each tensor's largest magnitude, scales that are known, blocks of 128
along each direction, squares of 128 by 128, the largest magnitudes of each tensor's tiles."""


class Codes(NamedTuple):
    """Tensors in FP8 along their last dimension, or, transposed, along their first.

    Tensors of equal size lie at equal distances, each padded with zeros on both sides. Rows of
    experts lie as they came; transposed, those of each expert begin at a tile.
    """

    elements: Float[Tensor, "rows contracted"]
    scale_inv: Float[Tensor, "*scales"]
    """[G] for tensors; [contracted/128, rows] for blocks along the last dimension; [G, rows/128,
    contracted/128 rounded up to 4] for squares: all as cuBLAS wants them, transposed."""


class Sides(NamedTuple):
    """An operand along its last dimension and along its first, as far as they were asked for."""

    row: Codes | None
    columnwise: Codes | None


@triton.jit
def to_bfloat16(x, EXACT: tl.constexpr):
    """Round float32 to bfloat16 and back; `EXACT` by integers, as the interpreter cuts bits off."""
    if EXACT:
        bits = x.to(tl.int32, bitcast=True)
        # an odd last bit rounds a half up; the sum wraps for no number that is finite
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def to_fp8(y, IS_E4M3: tl.constexpr, EXACT: tl.constexpr):
    """Return the bytes nearest to float32 numbers, ties to even, saturating; NaN stays NaN.

    The GPU's instruction does just that; `EXACT` does it by integers: for the interpreter, and
    where the compiler loses results of the instruction (see `has_kernels`).
    """
    if EXACT:
        BITS: tl.constexpr = 20 if IS_E4M3 else 21
        LOWEST: tl.constexpr = 121 if IS_E4M3 else 113  # exponent of the least normal number
        LARGEST: tl.constexpr = 448.0 if IS_E4M3 else 57344.0
        # added to a subnormal, it leaves as many bits as the code has
        ANCHOR: tl.constexpr = 16384.0 if IS_E4M3 else 128.0
        bits = y.to(tl.int32, bitcast=True)
        size = tl.where(y == y, tl.minimum(tl.abs(y), LARGEST), 0.0)
        plain = size.to(tl.int32, bitcast=True)
        rounded = (plain + ((1 << (BITS - 1)) - 1) + ((plain >> BITS) & 1)) >> BITS
        normal = rounded - ((LOWEST - 1) << (23 - BITS))
        anchored = (size + ANCHOR).to(tl.int32, bitcast=True)
        anchor = (size * 0.0 + ANCHOR).to(tl.int32, bitcast=True)
        code = tl.where((plain >> 23) >= LOWEST, normal, anchored - anchor)
        code = tl.where(y == y, code, 0x7F)
        return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
    if IS_E4M3:
        return y.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return y.to(tl.float8e5).to(tl.uint8, bitcast=True)


@triton.jit
def _encode_scale(bits, LARGEST: tl.constexpr, POWER: tl.constexpr):
    """Return `fp8.encode_scale` of magnitudes that are given as their bits."""
    amax = bits.to(tl.float32, bitcast=True)
    is_usable = (bits > 0) & (bits < 0x7F800000)
    scale = tl.div_rn(tl.where(is_usable, LARGEST, 1.0), tl.where(is_usable, amax, 1.0))
    scale = tl.where(is_usable, tl.minimum(scale, 3.4028234663852886e38), 1.0)
    if POWER:
        scale = (scale.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def _load_tile(x, stride, group_stride, group, first, end, each, block, columns,
               PLANNED: tl.constexpr, NARROW: tl.constexpr, EXACT: tl.constexpr,
               TILE: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    lane, beside = tl.arange(0, TILE), tl.arange(0, WIDTH)
    # a program's place takes 64 bits, what is inside a tile 32: half the registers of addresses
    if PLANNED:
        start = first.to(tl.int64) * stride
    else:
        start = (first - group * each).to(tl.int64) * stride + group.to(tl.int64) * group_stride
    mask = (first + lane < end)[:, None] & (block * WIDTH + beside < columns)[None, :]
    at = lane[:, None] * stride + beside[None, :]
    tile = tl.load(x + start + block * WIDTH + at, mask=mask, other=0.0).to(tl.float32)
    if NARROW:
        tile = to_bfloat16(tile, EXACT)
    return tile


@triton.jit
def _measure(x, parts, bounds, stride, group_stride, each, columns,
             GROUPS: tl.constexpr, SIZE: tl.constexpr, PLANNED: tl.constexpr,
             EXACT: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    block, tile = tl.program_id(0), tl.program_id(1)
    group, _, first, end = locate(tile, bounds, each, GROUPS, SIZE, PLANNED, TILE)
    if group < GROUPS:
        data = _load_tile(x, stride, group_stride, group, first, end, each, block, columns,
                          PLANNED, False, EXACT, TILE, WIDTH)  # fmt: skip
        # magnitudes are in the order of their bits, and a NaN is the largest
        bits = data.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.max(tl.max(bits, 1), 0)
        tl.store(parts + tile * tl.num_programs(0) + block, largest)


@triton.jit
def _largest_part(parts, bounds, group, tiles, blocks, GROUPS: tl.constexpr, PLANNED: tl.constexpr,
                  PARTS: tl.constexpr):  # fmt: skip
    """Return the bits of a tensor's largest magnitude; each has `tiles` where it is not planned."""
    if PLANNED:
        start = tl.load(bounds + GROUPS + 2 + group) * blocks
        end = tl.load(bounds + GROUPS + 3 + group) * blocks
    else:
        start, end = group * tiles * blocks, (group + 1) * tiles * blocks
    index = tl.arange(0, PARTS)
    found = tl.zeros([PARTS], tl.int32)
    for first in range(start, end, PARTS):
        at = first + index
        found = tl.maximum(found, tl.load(parts + at, mask=at < end, other=0))
    return tl.max(found, 0)


@triton.jit
def _largest(parts, out, bounds, tiles, blocks, stride,
             GROUPS: tl.constexpr, PLANNED: tl.constexpr, IS_LATE: tl.constexpr,
             PARTS: tl.constexpr):  # fmt: skip
    group = tl.program_id(0)
    largest = _largest_part(parts, bounds, group, tiles, blocks, GROUPS, PLANNED, PARTS)
    if IS_LATE:
        # a NaN leaves no trace
        largest = tl.where(largest > 0x7F800000, 0, largest)
        held = tl.load(out + group * stride)
        value = largest.to(tl.float32, bitcast=True)
        tl.store(out + group * stride, tl.where(value > held, value, held))
    else:
        tl.store(out + group * stride, largest.to(tl.float32, bitcast=True))


@triton.jit
def _quantize(
    x, given, row_codes, row_scales, columnwise_codes, columnwise_scales, parts, bounds,
    stride, group_stride, each, columns, rows_out, columns_out, columnwise_stride, scale_stride,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, PLANNED: tl.constexpr, NARROW: tl.constexpr,
    EXACT: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, IS_E4M3: tl.constexpr,
    SCALING: tl.constexpr, HAS_ROW: tl.constexpr, HAS_COLUMNWISE: tl.constexpr,
    MEASURES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    LARGEST: tl.constexpr = 448.0 if IS_E4M3 else 57344.0
    block, tile = tl.program_id(0), tl.program_id(1)
    group, place, first, end = locate(tile, bounds, each, GROUPS, SIZE, PLANNED, TILE)
    if group >= GROUPS:
        return
    if SCALING == 4:
        # before the tile takes the registers
        high, wide = (each + TILE - 1) // TILE, (columns + TILE - 1) // TILE
        amax = _largest_part(given, bounds, group, high, wide, GROUPS, PLANNED, PARTS)
    data = _load_tile(x, stride, group_stride, group, first, end, each, block, columns,
                      PLANNED, NARROW, EXACT, TILE, WIDTH)  # fmt: skip
    lane, beside = tl.arange(0, TILE), tl.arange(0, WIDTH)
    column_first = block * WIDTH
    column = column_first + beside
    # rows of experts stay where they are; a matrix is padded
    if PLANNED:
        row, row_end, columnwise_first, columnwise_end = first, end, tile * TILE, (tile + 1) * TILE
        columnwise_base = column_first.to(tl.int64) * columnwise_stride + columnwise_first
    else:
        columnwise_first, columnwise_end = place * TILE, rows_out
        row, row_end = group * rows_out + columnwise_first, (group + 1) * rows_out
        columnwise_base = (group.to(tl.int64) * columns_out + column_first) * columnwise_stride
        columnwise_base += columnwise_first
    bits = data.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if MEASURES:
        largest = tl.max(tl.max(bits, 1), 0)
        tl.store(parts + tile * tl.num_programs(0) + block, largest)

    if SCALING == 0 or SCALING == 1 or SCALING == 4:
        if SCALING == 0:
            held = tl.load(given + group).to(tl.int32, bitcast=True)
            scale = _encode_scale(held, LARGEST, False)
        elif SCALING == 1:
            scale = tl.load(given + group)
        else:
            scale = _encode_scale(amax, LARGEST, False)
        if (place == 0) & (block == 0):
            tl.store(row_scales + group, tl.div_rn(1.0, scale))
        codes = to_fp8(data * scale, IS_E4M3, EXACT)
        columnwise = codes
    elif SCALING == 3:
        scale = _encode_scale(tl.max(tl.max(bits, 1), 0), LARGEST, True)
        decode = tl.div_rn(1.0, scale)
        blocks = tl.num_programs(0)
        high = (rows_out + TILE - 1) // TILE
        wide, deep = (blocks + 3) // 4 * 4, (high + 3) // 4 * 4
        # the last one of a line fills it up to four with zeros
        beyond = tl.arange(0, 4)
        stored = tl.where(beyond == 0, decode, 0.0)
        if HAS_ROW:
            kept = (beyond == 0) | ((block == blocks - 1) & (block + beyond < wide))
            at = (group * high + place) * wide + block + beyond
            tl.store(row_scales + at, stored, mask=kept)
        if HAS_COLUMNWISE:
            kept = (beyond == 0) | ((place == high - 1) & (place + beyond < deep))
            at = (group * blocks + block) * deep + place + beyond
            tl.store(columnwise_scales + at, stored, mask=kept)
        codes = to_fp8(data * scale, IS_E4M3, EXACT)
        columnwise = codes
    else:
        if HAS_ROW:
            scale = _encode_scale(tl.max(bits, 1), LARGEST, True)
            tl.store(row_scales + block.to(tl.int64) * scale_stride + row + lane,
                     tl.div_rn(1.0, scale), mask=row + lane < row_end)  # fmt: skip
            codes = to_fp8(data * scale[:, None], IS_E4M3, EXACT)
        if HAS_COLUMNWISE:
            across = _encode_scale(tl.max(bits, 0), LARGEST, True)
            tl.store(columnwise_scales + tile.to(tl.int64) * columns_out + column,
                     tl.div_rn(1.0, across), mask=column < columns_out)  # fmt: skip
            columnwise = to_fp8(data * across[None, :], IS_E4M3, EXACT)

    if HAS_ROW:
        start = row.to(tl.int64) * columns_out + column_first
        at = lane[:, None] * columns_out + beside[None, :]
        mask = (row + lane < row_end)[:, None] & (column < columns_out)[None, :]
        codes = codes.to(row_codes.dtype.element_ty, bitcast=True)
        tl.store(row_codes + start + at, codes, mask=mask)
    if HAS_COLUMNWISE:
        at = beside[:, None] * columnwise_stride + lane[None, :]
        mask = (column < columns_out)[:, None] & (columnwise_first + lane < columnwise_end)[None, :]
        columnwise = tl.trans(columnwise).to(columnwise_codes.dtype.element_ty, bitcast=True)
        tl.store(columnwise_codes + columnwise_base + at, columnwise, mask=mask)


_measure_on, _largest_on, _quantize_on = map(Launcher, (_measure, _largest, _quantize))


AXES = ("groups", "rows", "columns")
# 32 elements a thread: with more, a tile and its transpose take all registers; two programs run on
# a multiprocessor where tiles may be narrow, so that one loads while the other stores
QUANTIZE = Tunable(
    "quantize_fp8",
    "tensors",
    (_quantize,),
    AXES,
    {"width": 64, "warps": 8},
    {"width": (32, 64, 128), "warps": (2, 4, 8, 16)},
)
QUANTIZE_BLOCKS = Tunable(
    "quantize_fp8", "blocks", (_quantize,), AXES, {"warps": 16}, {"warps": (4, 8, 16, 32)}
)
# enough loads at once to fill the memory's queue; a pass that only reads needs few registers
MEASURE = Tunable("quantize_fp8", "measure", (_measure,), AXES, {"warps": 8}, {"warps": (4, 8, 16)})
REDUCE_WARPS = 8


class Layout(NamedTuple):
    """Codes of the tensors of an operand: [G, N, K] of equal size, or the rows of experts."""

    groups: int
    """The number of tensors."""
    size: int
    """A power of two for what a program reads of the bounds of experts' rows."""
    each: int
    """Rows of each tensor, where all have as many."""
    columns: int
    tiles: int
    """Tiles one under another."""
    rows_out: int
    """Rows of each tensor's codes."""
    columns_out: int
    """Columns of each tensor's codes."""
    columnwise_rows: int
    """Rows of each tensor's codes, transposed, whose columns these are there."""
    lead: tuple[int, ...]
    """Dimensions of the codes before the last two."""

    def blocks(self, width: int) -> int:
        """Return how many tiles of so many columns lie beside one another."""
        return -(-self.columns_out // width)


@lru_cache(maxsize=1024)
def layout(shape: tuple[int, ...], experts: int | None, multiple: int) -> Layout:
    """Return the layout of a tensor, with codes whose sizes are rounded up to `multiple`.

    With a plan its rows belong to so many experts.
    """
    each, columns = shape[-2:]
    groups = experts or (shape[0] if len(shape) == 3 else 1)
    tiles, rows_out = -(-each // TILE) * groups, _round_up(each, multiple)
    columnwise_rows = rows_out
    if experts is not None:
        tiles, rows_out = most_tiles(each, experts), each
        columnwise_rows = tiles * TILE
    return Layout(
        groups, power_of_2(groups + 2), each, columns, tiles, rows_out,
        _round_up(columns, multiple), columnwise_rows, tuple(shape[:-2]),
    )  # fmt: skip


def has_kernels(dtype: torch.dtype, *, in_blocks: bool) -> bool:
    """Say whether a GPU gives tensors of this dtype right codes: in blocks, or from bfloat16.

    On compute capability 9.0 with Triton 3.6, float32 tensors with one scale got wrong transposed
    codes: rows of 0x60 and 0xFC. Its assembler (ptxas 12.8 and 12.9) loses a result of
    `cvt.rn.satfinite.e4m3x2.f32` that is read byte by byte, and reads the stack pointer, R1, in its
    place: the machine code has `LOP3 R, R1, 0xffff`. That of bfloat16 never reads R1, and that of
    blocks only for bytes that nothing uses. Source: github.com/triton-lang/triton/issues/11111.
    """
    return INTERPRETED or in_blocks or dtype == torch.bfloat16


def quantize(
    x: Float[Tensor, "*G N K"],
    format: FP8,
    scaling: int,
    *,
    given: Shaped[Tensor, " numbers"] | None = None,
    plan: Plan | None = None,
    multiple: int = TILE,
    row: bool = True,
    columnwise: bool = True,
    newest: Float[Tensor, " G"] | None = None,
    narrow: bool = False,
) -> Sides:
    """Quantize a matrix, the stacked matrices of experts, or the rows of experts by their plan.

    `given` are the largest magnitudes (BY_AMAX) or scales (BY_SCALE) of the tensors, or what
    `measure` returned (BY_PARTS); `newest` holds magnitudes that grow to those of the tensors.
    `narrow` rounds to bfloat16 first.
    """
    in_blocks = scaling in (BY_ROWS, BY_SQUARES)
    assert has_kernels(x.dtype, in_blocks=in_blocks), x.dtype
    experts = None if plan is None else plan.groups
    groups, size, each, columns, tiles, high, wide, long, lead = at = layout(
        x.shape, experts, multiple
    )
    data, stride, group_stride = _strides(x)
    device = x.device
    launch = (QUANTIZE_BLOCKS if in_blocks else QUANTIZE).at(x, groups, each, columns)
    # a block of scales is as wide as a tile
    width = launch.get("width", TILE)
    blocks = at.blocks(width)
    row_codes = columnwise_codes = None
    if row:
        row_codes = torch.empty((*lead, high, wide), dtype=format.dtype, device=device)
    if columnwise:
        columnwise_codes = torch.empty((*lead, wide, long), dtype=format.dtype, device=device)
    row_scales = columnwise_scales = None
    if not in_blocks:
        row_scales = columnwise_scales = torch.empty(groups, device=device)
    elif scaling == BY_SQUARES:
        deep = -(-high // TILE)
        row_scales = torch.empty(groups, deep, _round_up(blocks, 4), device=device)
        columnwise_scales = torch.empty(groups, blocks, _round_up(deep, 4), device=device)
    else:
        row_scales = torch.empty(blocks, high, device=device) if row else None
        columnwise_scales = torch.empty(tiles, wide, device=device) if columnwise else None
    parts = None
    if newest is not None:
        parts = torch.empty(tiles * blocks, dtype=torch.int32, device=device)
    # what a kernel neither reads nor writes may be any tensor
    _quantize_on(
        (blocks, tiles, 1),
        (data, _or(given, data), _or(row_codes, data), _or(row_scales, data),
         _or(columnwise_codes, data), _or(columnwise_scales, data), _or(parts, data),
         data if plan is None else plan.bounds),
        (stride, group_stride, each, columns, high, wide, long, high),
        (groups, size, plan is not None, narrow, INTERPRETED, TILE, width, format is E4M3, scaling,
         row, columnwise, parts is not None, PARTS),
        num_warps=launch["warps"],
    )  # fmt: skip
    if newest is not None:
        assert parts is not None
        _reduce(parts, newest, plan, at, blocks, is_late=True)
    return Sides(
        None if row_codes is None else Codes(row_codes, _held(row_scales)),
        None if columnwise_codes is None else Codes(columnwise_codes, _held(columnwise_scales)),
    )


def measure(x: Float[Tensor, "*G N K"], plan: Plan | None = None) -> Int[Tensor, " parts"]:
    """Return the bits of the largest magnitude of each tile, for `quantize`."""
    at = layout(x.shape, None if plan is None else plan.groups, TILE)
    data, stride, group_stride = _strides(x)
    blocks = at.blocks(TILE)
    launch = MEASURE.at(x, at.groups, at.each, at.columns)
    parts = torch.empty(at.tiles * blocks, dtype=torch.int32, device=x.device)
    _measure_on(
        (blocks, at.tiles, 1),
        (data, parts, parts if plan is None else plan.bounds),
        (stride, group_stride, at.each, at.columns),
        (at.groups, at.size, plan is not None, INTERPRETED, TILE, TILE),
        num_warps=launch["warps"],
    )  # fmt: skip
    return parts


def largest(x: Float[Tensor, "*G N K"], plan: Plan | None = None) -> Float[Tensor, " G"]:
    """Return the largest magnitude of each tensor; 0 where there is nothing."""
    parts = measure(x, plan)
    at = layout(x.shape, None if plan is None else plan.groups, TILE)
    amax = torch.empty(at.groups, device=x.device)
    _reduce(parts, amax, plan, at, at.blocks(TILE), is_late=False)
    return amax


def _reduce(
    parts: Tensor, out: Tensor, plan: Plan | None, at: Layout, blocks: int, *, is_late: bool
) -> None:
    """Write each tensor's largest magnitude, or let those of a history grow to them."""
    groups = at.groups
    _largest_on(
        (groups, 1, 1),
        (parts, out, parts if plan is None else plan.bounds),
        (at.tiles // groups, blocks, out.stride(0)),
        (groups, plan is not None, is_late, PARTS),
        num_warps=REDUCE_WARPS,
    )


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    return other if tensor is None else tensor


def _held(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _strides(x: Tensor) -> tuple[Tensor, int, int]:
    """Return a tensor whose rows are contiguous, the distance of its rows, and of its matrices."""
    data = x if x.stride(-1) == 1 else x.contiguous()
    if INTERPRETED:
        data = data.float()  # it reads subnormal numbers of bfloat16 as others
    strides = data.stride()
    return data, strides[-2], strides[0] if len(strides) == 3 else 0


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
