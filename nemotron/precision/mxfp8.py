"""MXFP8: FP8 elements and a power-of-two scale for each block of 32, or each square of 32 by 32.

Source: NVIDIA/TransformerEngine: transformer_engine/common/cast/mxfp8/quantize_mxfp8.cuh.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from nemotron.precision.blocks import block_amax, scale_blocks
from nemotron.precision.formats import E4M3, FP8, ceil_to_e8m0, decode_e8m0, decode_fp8, to_fp8

BLOCK = 32


@dataclass(frozen=True)
class MXFP8:
    """A matrix in MXFP8."""

    elements: Tensor
    """[M, K] in an FP8 dtype."""
    scales: UInt8[Tensor, "rows columns"]
    """E8M0 bytes of the blocks' decode scales."""
    height: int
    """Rows of a block."""
    width: int
    """Columns of a block."""

    @property
    def codes(self) -> UInt8[Tensor, "M K"]:
        """The elements as bytes."""
        return self.elements.view(torch.uint8)

    def dequantize(self) -> Float[Tensor, "M K"]:
        """Return the values in float32, exactly."""
        scales = decode_e8m0(self.scales)
        return scale_blocks(decode_fp8(self.elements), scales, self.height, self.width)


def quantize(
    x: Float[Tensor, "M K"], format: FP8 = E4M3, *, height: int = 1, width: int = BLOCK
) -> MXFP8:
    """Quantize a matrix in blocks of 32 along either dimension, or in squares of 32 by 32."""
    wide = x.float().contiguous()
    reciprocal = torch.tensor(format.max, dtype=torch.float32).reciprocal()
    scales = ceil_to_e8m0(block_amax(wide, height, width) * reciprocal)
    # 2^(127 - byte), the power of two of the opposite sign; 255, a NaN, is its own opposite
    factors = decode_e8m0(254 - scales)
    return MXFP8(to_fp8(scale_blocks(wide, factors, height, width), format), scales, height, width)
