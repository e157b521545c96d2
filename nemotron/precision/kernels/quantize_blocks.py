"""MXFP8 and NVFP4 on a GPU: one read of a matrix quantizes it along both directions.

A square tile is a program's. Codes and scales are those of `mxfp8.py` and
`nvfp4.py`, to the bit: float32 operations in the same order, and the same random bits.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from nemotron.ops.launch import INTERPRETED
from nemotron.precision import hadamard
from nemotron.precision.formats import E4M3
from nemotron.precision.kernels.quantize_fp8 import to_bfloat16, to_fp8

MX_TILE, MX_WARPS = 128, 16
NV_TILE, NV_WARPS = 64, 8
"""Rows and columns of a tile, whole blocks of its format, and what leaves 32 and 16 elements a
thread: with more, what is made of them along both directions takes all registers."""
MX_BLOCK, NV_BLOCK = 32, 16
MX_RECIPROCAL = torch.tensor(E4M3.max, dtype=torch.float32).reciprocal().item()
"""Of the largest E4M3 number, rounded to float32."""
GAMMA = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
FIRST, SECOND = (
    tl.constexpr(0xBF58476D1CE4E5B9 - (1 << 64)),
    tl.constexpr(0x94D049BB133111EB - (1 << 64)),
)
"""Numbers of SplitMix64 (`random_bits.py`) as they are in 64 bits with a sign."""


@triton.jit
def _load(x, stride, rows, columns, TILE: tl.constexpr):
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(x + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _magnitudes(x):
    """Return the bits of magnitudes, which are in their order, a NaN the largest."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _ceil_to_e8m0(bits, RECIPROCAL: tl.constexpr):
    """Return the byte of the least power of two that is at least a magnitude over the largest."""
    scaled = bits.to(tl.float32, bitcast=True) * RECIPROCAL
    own = scaled.to(tl.int32, bitcast=True)
    exponent, mantissa = own >> 23, own & 0x7FFFFF
    # a subnormal is the byte 0 up to 2^-127
    up = tl.where(exponent == 0, mantissa > (1 << 22), mantissa > 0)
    byte = tl.minimum(exponent + up.to(tl.int32), 254)
    return tl.where(scaled == scaled, byte, 255)


@triton.jit
def _inverse_of_e8m0(byte):
    """Return 2^(127 - byte); NaN for 255."""
    bits = tl.maximum((254 - byte) << 23, 1 << 22)
    return tl.where(byte == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def _mxfp8(
    x, row_codes, row_scales, columnwise_codes, columnwise_scales, stride, rows, columns,
    RECIPROCAL: tl.constexpr, BOTH: tl.constexpr, EXACT: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = TILE // BLOCK
    data = _load(x, stride, rows, columns, TILE)
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    wide = (columns + BLOCK - 1) // BLOCK

    beside = tl.reshape(data, [TILE, BLOCKS, BLOCK])
    byte = _ceil_to_e8m0(tl.max(_magnitudes(beside), 2), RECIPROCAL)
    scaled = tl.reshape(beside * _inverse_of_e8m0(byte)[:, :, None], [TILE, TILE])
    tl.store(row_codes + at, to_fp8(scaled, True, EXACT), mask=mask)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    tl.store(row_scales + row.to(tl.int64)[:, None] * wide + block[None, :], byte.to(tl.uint8),
             mask=(row < rows)[:, None] & (block < wide)[None, :])  # fmt: skip
    if BOTH:
        below = tl.reshape(data, [BLOCKS, BLOCK, TILE])
        byte = _ceil_to_e8m0(tl.max(_magnitudes(below), 1), RECIPROCAL)
        scaled = tl.reshape(below * _inverse_of_e8m0(byte)[:, None, :], [TILE, TILE])
        tl.store(columnwise_codes + at, to_fp8(scaled, True, EXACT), mask=mask)
        block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
        high = (rows + BLOCK - 1) // BLOCK
        tl.store(columnwise_scales + block.to(tl.int64)[:, None] * columns + column[None, :],
                 byte.to(tl.uint8),
                 mask=(block < high)[:, None] & (column < columns)[None, :])  # fmt: skip


@triton.jit
def _transform(data, matrix, EXACT: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply each chunk of 16 rows by the Hadamard matrix, transposed; round to bfloat16."""
    BLOCKS: tl.constexpr = TILE // BLOCK
    lane = tl.arange(0, BLOCK)
    factors = tl.load(matrix + lane[:, None] * BLOCK + lane[None, :])
    factors = tl.broadcast_to(factors[None, :, :], [BLOCKS, BLOCK, BLOCK])
    chunks = tl.reshape(data, [BLOCKS, BLOCK, TILE])
    mixed = tl.dot(factors, chunks, input_precision="ieee")
    return to_bfloat16(tl.reshape(mixed, [TILE, TILE]), EXACT)


@triton.jit
def _bands(
    x, matrix, row_parts, columnwise_parts, stride, rows, columns, COLUMNWISE: tl.constexpr,
    TRANSFORMED: tl.constexpr, EXACT: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = TILE // BLOCK
    data = _load(x, stride, rows, columns, TILE)
    band = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    at = band * tl.num_programs(0) + tl.program_id(0)
    mask = band < (rows + BLOCK - 1) // BLOCK
    largest = tl.max(tl.reshape(_magnitudes(data), [BLOCKS, BLOCK * TILE]), 1)
    tl.store(row_parts + at, largest, mask=mask)
    if COLUMNWISE:
        if TRANSFORMED:
            mixed = _transform(data, matrix, EXACT, TILE, BLOCK)
            largest = tl.max(tl.reshape(_magnitudes(mixed), [BLOCKS, BLOCK * TILE]), 1)
        tl.store(columnwise_parts + at, largest, mask=mask)


@triton.jit
def _e4m3_value(code):
    """Return the number of a byte without a sign."""
    exponent, mantissa = code >> 3, code & 7
    normal = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
    value = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, normal)
    return tl.where(code == 0x7F, float("nan"), value)


@triton.jit
def _factor(bits, folded, decode):
    """Return the bytes of blocks' scales, and what their elements are multiplied by.

    Bytes are rounded by integers on a GPU too: with Triton 3.6 on compute capability 9.0 the bytes
    of the conversion's instruction were wrong, as `quantize_fp8.has_kernels` describes it.
    """
    FLT_MAX: tl.constexpr = 3.4028234663852886e38
    scaled = bits.to(tl.float32, bitcast=True) * folded
    code = to_fp8(tl.where(scaled > FLT_MAX, FLT_MAX, scaled), True, True)
    product = _e4m3_value(code.to(tl.int32)) * decode
    inverse = tl.div_rn(1.0, tl.where(product == 0, 1.0, product))
    return code, tl.where((product == 0) | (inverse > FLT_MAX), FLT_MAX, inverse)


@triton.jit
def _half_power(magnitude):
    """Return the distance of neighbors in E2M1: half a magnitude's power of two, at least 0.5."""
    power = (magnitude.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.maximum(power, 1.0) * 0.5


@triton.jit
def _inverse(step):
    """Return 1 over a step of 0.5, 1 or 2; a plain division is not exact on a GPU."""
    return tl.where(step == 0.5, 2.0, tl.where(step == 1.0, 1.0, 0.5))


@triton.jit
def _round_e2m1(y, drawn, STOCHASTIC: tl.constexpr):
    """Round to E2M1, to nearest even or up by 8 random bits; a NaN becomes 6."""
    sign = y.to(tl.int32, bitcast=True) & -2147483648
    size = tl.where(y == y, tl.minimum(tl.abs(y), 6.0), 6.0)
    if STOCHASTIC:
        raised = size + drawn.to(tl.float32) * 0.00390625 * _half_power(size)
        step = _half_power(raised)
        rounded = tl.minimum(tl.floor(raised * _inverse(step)) * step, 6.0)
    else:
        sign = tl.where(y == y, sign, 0)
        step = _half_power(size)
        # the sum has no bits left for fractions
        rounded = ((size * _inverse(step) + 8388608.0) - 8388608.0) * step
    return (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _draw(seeds, first, rows, TILE: tl.constexpr):
    """Return 8 random bits for each element: SplitMix64 of the row's seed and the column."""
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    seed = tl.load(seeds + row, mask=row < rows, other=0)
    start = first + tl.program_id(0).to(tl.int64) * TILE
    # a tile begins inside a word unless `first` is a multiple of 8: one byte after another then
    column = start + tl.arange(0, TILE).to(tl.int64)
    state = seed[:, None] + (column // 8 + 1)[None, :] * GAMMA
    state = (state ^ ((state >> 30) & 0x3FFFFFFFF)) * FIRST
    state = (state ^ ((state >> 27) & 0x1FFFFFFFFF)) * SECOND
    state = state ^ ((state >> 31) & 0x1FFFFFFFF)
    return ((state >> ((column % 8) * 8)[None, :]) & 255).to(tl.int32)


@triton.jit
def _nvfp4(
    x, matrix, row_folded, row_decode, columnwise_folded, columnwise_decode,
    row_seeds, columnwise_seeds, row_elements, row_scales, columnwise_elements, columnwise_scales,
    stride, rows, columns, first, SQUARE: tl.constexpr, COLUMNWISE: tl.constexpr,
    TRANSFORMED: tl.constexpr, STOCHASTIC: tl.constexpr, EXACT: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = TILE // BLOCK
    data = _load(x, stride, rows, columns, TILE)
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    wide, high = (columns + BLOCK - 1) // BLOCK, (rows + BLOCK - 1) // BLOCK
    beside = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    band = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)

    if SQUARE:
        folded = tl.load(row_folded + band, mask=band < high, other=0.0)
        decode = tl.load(row_decode + band, mask=band < high, other=1.0)
        blocks = tl.reshape(data, [BLOCKS, BLOCK, BLOCKS, BLOCK])
        largest = tl.max(tl.max(_magnitudes(blocks), 3), 1)
        code, factor = _factor(largest, folded[:, None], decode[:, None])
        y = tl.reshape(blocks * factor[:, None, :, None], [TILE, TILE])
        tl.store(row_scales + band.to(tl.int64)[:, None] * wide + beside[None, :], code,
                 mask=(band < high)[:, None] & (beside < wide)[None, :])  # fmt: skip
        tl.store(row_elements + at, _round_e2m1(y, 0, False), mask=inside)
    else:
        folded = tl.load(row_folded + row // BLOCK, mask=row < rows, other=0.0)
        decode = tl.load(row_decode + row // BLOCK, mask=row < rows, other=1.0)
        blocks = tl.reshape(data, [TILE, BLOCKS, BLOCK])
        code, factor = _factor(tl.max(_magnitudes(blocks), 2), folded[:, None], decode[:, None])
        y = tl.reshape(blocks * factor[:, :, None], [TILE, TILE])
        tl.store(row_scales + row.to(tl.int64)[:, None] * wide + beside[None, :], code,
                 mask=(row < rows)[:, None] & (beside < wide)[None, :])  # fmt: skip
        drawn = _draw(row_seeds, first, rows, TILE) if STOCHASTIC else 0
        tl.store(row_elements + at, _round_e2m1(y, drawn, STOCHASTIC), mask=inside)
    if COLUMNWISE:
        folded = tl.load(columnwise_folded + band, mask=band < high, other=0.0)
        decode = tl.load(columnwise_decode + band, mask=band < high, other=1.0)
        if TRANSFORMED:
            data = _transform(data, matrix, EXACT, TILE, BLOCK)
        blocks = tl.reshape(data, [BLOCKS, BLOCK, TILE])
        code, factor = _factor(tl.max(_magnitudes(blocks), 1), folded[:, None], decode[:, None])
        y = tl.reshape(blocks * factor[:, None, :], [TILE, TILE])
        tl.store(columnwise_scales + band.to(tl.int64)[:, None] * columns + column[None, :], code,
                 mask=(band < high)[:, None] & (column < columns)[None, :])  # fmt: skip
        drawn = _draw(columnwise_seeds, first, rows, TILE) if STOCHASTIC else 0
        tl.store(columnwise_elements + at, _round_e2m1(y, drawn, STOCHASTIC), mask=inside)


def mxfp8(
    x: Float[Tensor, "M K"], *, both: bool
) -> tuple[tuple[Tensor, UInt8[Tensor, "M k"]], tuple[Tensor, UInt8[Tensor, "m K"]] | None]:
    """Return elements and scale bytes in blocks of 32 columns, and in blocks of 32 rows."""
    data, rows, columns = _rows_of(x)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=x.device)
    scales = codes.new_empty(rows, -(-columns // MX_BLOCK))
    columnwise = torch.empty_like(codes) if both else codes
    columnwise_scales = codes.new_empty(-(-rows // MX_BLOCK), columns) if both else codes
    if rows:
        _mxfp8[_grid(rows, columns, MX_TILE)](
            data, codes, scales, columnwise, columnwise_scales, data.stride(0), rows, columns,
            MX_RECIPROCAL, both, INTERPRETED, MX_TILE, MX_BLOCK, num_warps=MX_WARPS,
        )  # fmt: skip
    found = codes.view(E4M3.dtype), scales
    return found, (columnwise.view(E4M3.dtype), columnwise_scales) if both else None


def band_magnitudes(
    x: Float[Tensor, "M K"], *, columnwise: bool, transformed: bool
) -> tuple[Float[Tensor, "bands 1"], Float[Tensor, "bands 1"]]:
    """Return the largest magnitude of each 16 rows, as they are and transformed."""
    data, rows, columns = _rows_of(x)
    bands, blocks = -(-rows // NV_BLOCK), -(-columns // NV_TILE)
    parts = torch.empty(2, bands, blocks, dtype=torch.int32, device=x.device)
    if rows:
        _bands[_grid(rows, columns, NV_TILE)](
            data, _matrix(x.device), parts[0], parts[1], data.stride(0), rows, columns,
            columnwise, transformed, INTERPRETED, NV_TILE, NV_BLOCK, num_warps=NV_WARPS,
        )  # fmt: skip
    largest = parts.amax(2, keepdim=True).view(torch.float32)
    return largest[0], largest[1]


def nvfp4(
    x: Float[Tensor, "M K"],
    row: tuple[Float[Tensor, "bands 1"], Float[Tensor, "bands 1"]],
    columnwise: tuple[Float[Tensor, "bands 1"], Float[Tensor, "bands 1"]] | None,
    *,
    square: bool,
    transformed: bool,
    seeds: tuple[Int[Tensor, " M"], Int[Tensor, " M"]] | None,
    first: int = 0,
) -> list[tuple[Float[Tensor, "M K"], UInt8[Tensor, "m k"]]]:
    """Return elements and scale bytes along the columns, or in squares, and along the rows.

    `row` and `columnwise` are for each 16 rows the encode scale of their tensor over 6, and its
    decode scale. `seeds` are those of the rows' random bits, `first` is the first column's number.
    """
    data, rows, columns = _rows_of(x)
    elements = torch.empty(rows, columns, device=x.device)
    high = -(-rows // NV_BLOCK)
    shape = (high if square else rows, -(-columns // NV_BLOCK))
    scales = torch.empty(shape, dtype=torch.uint8, device=x.device)
    found = [(elements, scales)]
    if columnwise is not None:
        found.append((torch.empty_like(elements), scales.new_empty(high, columns)))
    own, across = row, columnwise or row
    row_seeds, columnwise_seeds = seeds or (scales, scales)
    if rows:
        _nvfp4[_grid(rows, columns, NV_TILE)](
            data, _matrix(x.device), own[0], own[1], across[0], across[1],
            row_seeds, columnwise_seeds, *found[0], *found[-1], data.stride(0), rows, columns,
            first, square, columnwise is not None, transformed, seeds is not None, INTERPRETED,
            NV_TILE, NV_BLOCK, num_warps=NV_WARPS,
        )  # fmt: skip
    return found


def _grid(rows: int, columns: int, tile: int) -> tuple[int, int]:
    return -(-columns // tile), -(-rows // tile)


def _rows_of(x: Tensor) -> tuple[Tensor, int, int]:
    data = x if x.stride(-1) == 1 else x.contiguous()
    # the interpreter reads subnormal numbers of bfloat16 as others
    return (data.float() if INTERPRETED else data), x.shape[0], x.shape[1]


def _matrix(device: torch.device) -> Tensor:
    return hadamard.matrix().T.contiguous().to(device)
