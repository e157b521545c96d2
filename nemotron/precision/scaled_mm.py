"""Products of quantized operands by torch's scaled matrix product: cuBLAS on a GPU.

Operands are padded with zeros to the sizes that cuBLAS takes, which changes no sum. Layouts of
the scales: NVIDIA, cuBLAS documentation, "Scaling Factors Layouts"; pytorch/pytorch:
aten/src/ATen/native/cuda/ScaledBlas.cpp.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType

from nemotron.precision import mxfp8, nvfp4
from nemotron.precision.formats import pack_e2m1
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


def multiply(left: Quantized, right: Quantized, outs: Sequence[Float[Tensor, "M N"]]) -> None:
    """Write left rightᵀ of each tensor into `outs`, summed in float32 there and rounded once."""
    for group, out in enumerate(outs):
        if not left.groups.sizes[group] or not right.groups.sizes[group]:
            out.zero_()
            continue
        a, b = _sides(left, right, group)
        result = F.scaled_mm(
            a.elements,
            b.elements.T,
            a.scales,
            a.kinds,
            b.scales,
            b.kinds,
            swizzle_a=a.swizzles,
            swizzle_b=b.swizzles,
            output_dtype=out.dtype,
            use_fast_accum=False,  # it keeps fewer bits of the sums
        )
        out.copy_(result[: out.shape[0], : out.shape[1]])


def _sides(left: Quantized, right: Quantized, group: int) -> tuple[Side, Side]:
    a, b = left.matrix, right.matrix
    if isinstance(a, ScaledFP8) and isinstance(b, ScaledFP8):
        parts = _FP8Operand.of(a, left, group), _FP8Operand.of(b, right, group)
        # blocks of 128 may be one scale, too: cuBLAS takes that for both sides or for none
        has_one = all(part.scale_inv.numel() == 1 for part in parts)
        first, second = (part.side(has_one=has_one) for part in parts)
        return first, second
    return _side(left, group), _side(right, group)


@dataclass(frozen=True)
class _FP8Operand:
    """One tensor's part of a matrix in FP8, contracted along its last dimension."""

    elements: Tensor
    scale_inv: Tensor
    height: int

    @classmethod
    def of(cls, matrix: ScaledFP8, side: Quantized, group: int) -> "_FP8Operand":
        rows = side.groups.padded_rows(group)
        elements = _lying(matrix.elements[rows], side.columnwise)
        if matrix.per_tensor:
            first = 0 if len(matrix.scale_inv) == 1 else rows.start
            return cls(elements, matrix.scale_inv[first : first + 1], 1)
        scales = matrix.scale_inv[side.groups.padded_rows(group, matrix.height)]
        height = matrix.width if side.columnwise else matrix.height
        return cls(elements, _lying(scales, side.columnwise), height)

    def side(self, *, has_one: bool) -> Side:
        if has_one:
            elements = _padded(self.elements, 16, 16)
            return Side(elements, [self.scale_inv.view(())], [ScalingType.TensorWise], [])
        kind, swizzle = ScalingType.BlockWise1x128, SwizzleType.NO_SWIZZLE
        elements = _padded(self.elements, BLOCK, BLOCK)
        if self.height == 1:  # a row's blocks, whose scales lie column by column
            scales = _padded(self.scale_inv, BLOCK, 1).T.contiguous().T
        else:  # squares, whose scales along the contracted dimension are rounded up to four
            kind = ScalingType.BlockWise128x128
            scales = _padded(self.scale_inv, 1, 4).T
        return Side(elements, [scales], [kind], [swizzle])


def _side(side: Quantized, group: int) -> Side:
    matrix, rows = side.matrix, side.groups.padded_rows(group)
    if isinstance(matrix, mxfp8.MXFP8):
        assert matrix.height * matrix.width == mxfp8.BLOCK, "squares of MXFP8 have no product here"
        scales = matrix.scales[side.groups.padded_rows(group, matrix.height)]
        return Side(
            _padded(_lying(matrix.elements[rows], side.columnwise), 16, mxfp8.BLOCK),
            [_swizzled(_lying(scales, side.columnwise)).view(torch.float8_e8m0fnu)],
            [ScalingType.BlockWise1x32],
            [SwizzleType.SWIZZLE_32_4_4],
        )
    assert not isinstance(matrix, ScaledFP8)
    scales = matrix.scales.bytes[side.groups.padded_rows(group, matrix.scales.height)]
    codes, scales = _lying(matrix.codes[rows], side.columnwise), _lying(scales, side.columnwise)
    if matrix.scales.height == matrix.scales.width:  # a square's rows get a scale each
        scales = scales.repeat_interleave(nvfp4.BLOCK, 0)[: codes.shape[0]]
    # a byte holds two elements: 16 bytes are the 32 elements that cuBLAS asks for
    return Side(
        _padded(pack_e2m1(codes), 16, 16).view(torch.float4_e2m1fn_x2),
        [
            _swizzled(scales).view(torch.float8_e4m3fn),
            matrix.scales.outer[group],
        ],
        [ScalingType.BlockWise1x16, ScalingType.TensorWise],
        [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE],
    )


def _lying(matrix: Shaped[Tensor, "rows columns"], columnwise: bool) -> Tensor:
    """Let the contracted dimension be the last."""
    return matrix.T.contiguous() if columnwise else matrix


def _padded(matrix: Shaped[Tensor, "rows columns"], height: int, width: int) -> Tensor:
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
    padded = _padded(scales, *TILE)
    tiles = padded.view(padded.shape[0] // 128, 4, 32, padded.shape[1] // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).contiguous().view(padded.shape)
