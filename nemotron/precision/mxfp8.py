"""MXFP8: FP8 elements and a power-of-two scale for each block of 32, or each square of 32 by 32.

Source: NVIDIA/TransformerEngine: transformer_engine/common/cast/mxfp8/quantize_mxfp8.cuh.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from nemotron.precision.blocks import block_amax, scale_blocks
from nemotron.precision.formats import E4M3, FP8, ceil_to_e8m0, decode_e8m0, power_of_two, to_fp8

BLOCK = 32


@dataclass(frozen=True)
class MXFP8:
    """A matrix in MXFP8, quantised along its last dimension."""

    elements: Tensor
    """[M, K] in an FP8 dtype."""
    scales: UInt8[Tensor, "rows columns"]
    """E8M0 bytes of the blocks' decode scales."""
    height: int
    """Rows of a block: 1 or 32."""

    @property
    def codes(self) -> UInt8[Tensor, "M K"]:
        """The elements as bytes."""
        return self.elements.view(torch.uint8)

    def dequantize(self) -> Float[Tensor, "M K"]:
        """Return the values in float32, exactly."""
        return scale_blocks(self.elements.float(), decode_e8m0(self.scales), self.height, BLOCK)


def quantize(x: Float[Tensor, "M K"], format: FP8 = E4M3, *, square: bool = False) -> MXFP8:
    """Quantise a matrix in blocks of 32 along its last dimension, or in squares."""
    height = BLOCK if square else 1
    reciprocal = torch.tensor(format.max, dtype=torch.float32).reciprocal()
    scales = ceil_to_e8m0(block_amax(x.float(), height, BLOCK) * reciprocal)
    # 2^(127 - byte): the float32 power of the opposite sign, down to the subnormal 2^-127
    factors = power_of_two(127 - scales.long())
    return MXFP8(to_fp8(scale_blocks(x.float(), factors, height, BLOCK), format), scales, height)
