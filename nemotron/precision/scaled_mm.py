"""Products of quantised operands by torch's scaled matrix product: cuBLAS on a GPU.

Operands are filled up with zeros to the sizes that cuBLAS takes, which changes no sum. Layouts of
the scales: NVIDIA, cuBLAS documentation, "Scaling Factors Layouts"; pytorch/pytorch:
aten/src/ATen/native/cuda/ScaledBlas.cpp.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType

from nemotron.precision import mxfp8, nvfp4
from nemotron.precision.blocks import spread
from nemotron.precision.formats import pack_e2m1, unpack_e2m1
from nemotron.precision.fp8 import BLOCK, ScaledFP8
from nemotron.precision.schemes import Quantized

TILE = (128, 4)
"""Rows and columns of block scales that lie together in a GPU's memory."""


@dataclass(frozen=True)
class Side:
    """One side of a product as torch takes it; rows of `elements` contract."""

    elements: Tensor
    scales: list[Tensor]
    kinds: list[ScalingType]
    swizzles: list[SwizzleType]


def multiply(left: Quantized, right: Quantized, dtype: torch.dtype) -> Float[Tensor, "M N"]:
    """Return left rightᵀ, summed in float32 on the device and rounded once."""
    rows, columns = _num_rows(left), _num_rows(right)
    # blocks of 128 may be one scale, too: cuBLAS takes that for both sides or for none
    has_one = _has_one_scale(left) and _has_one_scale(right)
    a, b = _side(left, has_one), _side(right, has_one)
    result = F.scaled_mm(
        a.elements,
        b.elements.T,
        a.scales,
        a.kinds,
        b.scales,
        b.kinds,
        swizzle_a=a.swizzles,
        swizzle_b=b.swizzles,
        output_dtype=dtype,
        use_fast_accum=False,  # it keeps fewer bits of the sums
    )
    return result[:rows, :columns]


def _has_one_scale(side: Quantized) -> bool:
    return isinstance(side.matrix, ScaledFP8) and side.matrix.scale_inv.numel() == 1


def _num_rows(side: Quantized) -> int:
    matrix = side.matrix
    if isinstance(matrix, nvfp4.PackedNVFP4):
        return matrix.columns if side.turned else matrix.codes.shape[0]
    return matrix.elements.shape[1 if side.turned else 0]


def _side(side: Quantized, has_one: bool) -> Side:
    matrix = side.matrix
    if isinstance(matrix, mxfp8.MXFP8):
        return _mxfp8(matrix, side.turned)
    if isinstance(matrix, ScaledFP8):
        if has_one:
            return _one_scale(matrix, side.turned)
        return _squares(matrix, side.turned) if matrix.height == BLOCK else _rows(matrix)
    return _nvfp4(matrix, side.turned)


def _one_scale(matrix: ScaledFP8, turned: bool) -> Side:
    elements = _filled(_lying(matrix.elements, turned), 16, 16)
    return Side(elements, [matrix.scale_inv.view(())], [ScalingType.TensorWise], [])


def _rows(matrix: ScaledFP8) -> Side:
    """A row's blocks of 128, whose scales lie column by column."""
    elements = _filled(matrix.elements, BLOCK, BLOCK)
    scales = _filled(matrix.scale_inv, BLOCK, 1).T.contiguous().T
    return Side(elements, [scales], [ScalingType.BlockWise1x128], [SwizzleType.NO_SWIZZLE])


def _squares(matrix: ScaledFP8, turned: bool) -> Side:
    """Squares of 128, whose scales along the contracted dimension are rounded up to four."""
    elements = _filled(_lying(matrix.elements, turned), BLOCK, BLOCK)
    scales = _filled(_lying(matrix.scale_inv, turned), 1, 4).T
    return Side(elements, [scales], [ScalingType.BlockWise128x128], [SwizzleType.NO_SWIZZLE])


def _mxfp8(matrix: mxfp8.MXFP8, turned: bool) -> Side:
    assert matrix.height == 1, "squares of MXFP8 have no product here"
    assert not turned, "blocks of a row do not turn"
    elements = _filled(matrix.elements, 16, mxfp8.BLOCK)
    scales = _swizzled(matrix.scales).view(torch.float8_e8m0fnu)
    return Side(elements, [scales], [ScalingType.BlockWise1x32], [SwizzleType.SWIZZLE_32_4_4])


def _nvfp4(matrix: nvfp4.NVFP4 | nvfp4.PackedNVFP4, turned: bool) -> Side:
    codes, scales = matrix.codes, matrix.scales
    if turned:  # of a square's 16 equal rows of scales, one
        columns = matrix.columns if isinstance(matrix, nvfp4.PackedNVFP4) else None
        codes = pack_e2m1(unpack_e2m1(codes)[:, :columns].T.contiguous())
        squares = scales[:: nvfp4.BLOCK].T
        scales = spread(squares, nvfp4.BLOCK, 1, (codes.shape[0], squares.shape[1])).contiguous()
    # a byte holds two elements: 16 bytes are the 32 elements that cuBLAS asks for
    elements = _filled(codes, 16, 16).view(torch.float4_e2m1fn_x2)
    block_scales = _swizzled(scales[: codes.shape[0]]).view(torch.float8_e4m3fn)
    return Side(
        elements,
        [block_scales, (matrix.amax / nvfp4.GLOBAL_MAX).view(())],
        [ScalingType.BlockWise1x16, ScalingType.TensorWise],
        [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE],
    )


def _lying(matrix: Tensor, turned: bool) -> Tensor:
    return matrix.T.contiguous() if turned else matrix


def _filled(matrix: Shaped[Tensor, "rows columns"], height: int, width: int) -> Tensor:
    """Round both sizes up with zeros; the code 0 is zero in every format."""
    below, beside = -matrix.shape[0] % height, -matrix.shape[1] % width
    if not below and not beside:
        return matrix.contiguous()
    raw = matrix if matrix.dtype == torch.float32 else matrix.view(torch.uint8)
    return F.pad(raw, (0, beside, 0, below)).view(matrix.dtype)


def _swizzled(scales: Shaped[Tensor, "rows columns"]) -> Tensor:
    """Lay tiles of 128 by 4 one after another, each as 32 rows of its 4 quarters.

    The scale in row r and column c of a tile lies at 16 (r mod 32) + 4 (r div 32) + c.
    """
    filled = _filled(scales, *TILE)
    tiles = filled.view(filled.shape[0] // 128, 4, 32, filled.shape[1] // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).contiguous().view(filled.shape)
