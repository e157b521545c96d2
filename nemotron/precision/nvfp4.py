"""NVFP4: E2M1 elements, an E4M3 scale for each block of 16, one float32 scale for the tensor.

The order of the float32 operations is Transformer Engine's, which decides the last bit.
Source: NVIDIA/TransformerEngine: transformer_engine/common/cast/nvfp4/core_nvfp4.cuh.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from nemotron.precision.blocks import block_amax, scale_blocks, spread
from nemotron.precision.formats import (
    E2M1_MAX,
    E4M3,
    FLT_MAX,
    decode_e2m1,
    divide,
    encode_e2m1,
    pack_e2m1,
    round_e2m1,
    round_e2m1_stochastically,
    to_fp8,
    unpack_e2m1,
)

BLOCK = 16
GLOBAL_MAX = E4M3.max * E2M1_MAX
"""Largest value that codes and block scales reach together: 2688."""


@dataclass(frozen=True)
class NVFP4:
    """A matrix in NVFP4, quantised along its last dimension."""

    elements: Float[Tensor, "M K"]
    """E2M1 values in float32."""
    scales: UInt8[Tensor, "M blocks"]
    """E4M3 bytes of the blocks' decode scales; a square block's is repeated in its rows."""
    amax: Float[Tensor, ""]
    """Largest magnitude of the whole tensor."""

    @cached_property
    def codes(self) -> UInt8[Tensor, "M half"]:
        """Two codes a byte."""
        return pack_e2m1(encode_e2m1(self.elements))

    @property
    def scale(self) -> Float[Tensor, ""]:
        """What a product of unscaled operands is multiplied by, for this operand."""
        return self.amax / GLOBAL_MAX

    def pack(self) -> "PackedNVFP4":
        """Return the form that takes 4.5 bits for each element."""
        return PackedNVFP4(self.codes, self.scales, self.amax, self.elements.shape[1])

    def unscaled(self) -> Float[Tensor, "M K"]:
        """Return elements times block scales: at most 6 significant bits, exact in bfloat16."""
        return self._scaled(self.scales.view(E4M3.dtype).float())

    def dequantize(self) -> Float[Tensor, "M K"]:
        """Return the values in float32, in the kernel's order.

        Source: transformer_engine/common/cast/nvfp4/dequantize_nvfp4.cuh.
        """
        scales = self.scales.view(E4M3.dtype).float() * self.amax * _reciprocal(GLOBAL_MAX)
        return self._scaled(scales)

    def _scaled(self, scales: Tensor) -> Tensor:
        # where the rows do not divide by a square's, it has scales for more rows than there are
        return scale_blocks(self.elements, scales[: self.elements.shape[0]], 1, BLOCK)


@dataclass(frozen=True)
class PackedNVFP4:
    """A matrix in NVFP4 as it is stored."""

    codes: UInt8[Tensor, "M half"]
    scales: UInt8[Tensor, "M blocks"]
    amax: Float[Tensor, ""]
    columns: int

    def unpack(self) -> NVFP4:
        """Return the form that is computed with."""
        elements = decode_e2m1(unpack_e2m1(self.codes))[:, : self.columns]
        return NVFP4(elements, self.scales, self.amax)


def quantize(
    x: Float[Tensor, "M K"],
    *,
    square: bool = False,
    amax: Float[Tensor, ""] | None = None,
    bits: UInt8[Tensor, "M K"] | None = None,
) -> NVFP4:
    """Quantise a matrix in blocks of 16 along its last dimension, or in squares of 16 by 16.

    `amax` is the largest magnitude when it is known over more than this tensor; `bits` gives each
    element 8 random bits for stochastic rounding, without them it is rounded to nearest even.
    """
    wide, height = x.float(), BLOCK if square else 1
    blocks = block_amax(wide, height, BLOCK)
    amax = blocks.amax() if amax is None else amax
    encode = _global_encode_scale(amax)
    folded = encode * _reciprocal(E2M1_MAX)
    scales = to_fp8((blocks * folded).clamp(max=FLT_MAX), E4M3)
    # one over a zero scale is infinite: such a block decodes to zeros, whatever its codes are
    factors = (1 / (scales.float() * (1 / encode))).clamp(max=FLT_MAX)
    y = scale_blocks(wide, factors, height, BLOCK)
    elements = round_e2m1(y) if bits is None else round_e2m1_stochastically(y, bits)
    padded_rows = blocks.shape[0] * height
    per_row = spread(scales.view(torch.uint8), height, 1, (padded_rows, blocks.shape[1]))
    return NVFP4(elements, per_row.contiguous(), amax)


def _global_encode_scale(amax: Tensor) -> Tensor:
    scale = divide(GLOBAL_MAX, amax.float()).clamp(max=FLT_MAX)
    return torch.where((amax == 0) | (scale == 0), 1.0, scale)


def _reciprocal(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32).reciprocal()
