"""NVFP4: E2M1 elements, an E4M3 scale for each block of 16, one float32 scale for the tensor.

The order of the float32 operations is Transformer Engine's, which decides the last bit.
Source: NVIDIA/TransformerEngine: transformer_engine/common/cast/nvfp4/core_nvfp4.cuh.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from nemotron.precision.blocks import block_amax, scale_blocks
from nemotron.precision.formats import (
    E2M1_MAX,
    E4M3,
    FLT_MAX,
    decode_e2m1,
    decode_fp8,
    divide,
    encode_e2m1,
    pack_e2m1,
    round_e2m1,
    round_e2m1_stochastically,
    to_fp8,
    unpack_e2m1,
)
from nemotron.precision.groups import Groups

BLOCK = 16
GLOBAL_MAX = E4M3.max * E2M1_MAX
"""Largest value that codes and block scales reach together: 2688."""


@dataclass(frozen=True)
class Scales:
    """The scales of a matrix in NVFP4."""

    bytes: UInt8[Tensor, "rows columns"]
    """E4M3 bytes of the blocks' decode scales."""
    amax: Float[Tensor, " G"]
    """Largest magnitude of each tensor in the matrix."""
    groups: Groups
    height: int
    """Rows of a block."""
    width: int
    """Columns of a block."""

    @property
    def blocks(self) -> Float[Tensor, "rows columns"]:
        """The blocks' decode scales."""
        return decode_fp8(self.bytes.view(E4M3.dtype))

    @property
    def outer(self) -> Float[Tensor, " G"]:
        """What a product of unscaled operands is multiplied by, for this operand."""
        return self.amax / GLOBAL_MAX


@dataclass(frozen=True)
class NVFP4:
    """A matrix in NVFP4."""

    elements: Float[Tensor, "M K"]
    """E2M1 values in float32."""
    scales: Scales

    @cached_property
    def codes(self) -> UInt8[Tensor, "M K"]:
        """A code a byte."""
        return encode_e2m1(self.elements)

    def pack(self) -> "PackedNVFP4":
        """Return the form that takes 4.5 bits for each element."""
        return PackedNVFP4(pack_e2m1(self.codes), self.scales, self.elements.shape[1])

    def unscaled(self) -> Float[Tensor, "M K"]:
        """Return elements times block scales: at most 6 significant bits, exact in bfloat16."""
        return scale_blocks(
            self.elements, self.scales.blocks, self.scales.height, self.scales.width
        )

    def dequantize(self) -> Float[Tensor, "M K"]:
        """Return the values in float32, in the kernel's order.

        Source: transformer_engine/common/cast/nvfp4/dequantize_nvfp4.cuh.
        """
        scales = self.scales
        amax = scales.groups.spread(scales.amax, scales.height)
        factors = scales.blocks * amax * _reciprocal(GLOBAL_MAX)
        return scale_blocks(self.elements, factors, scales.height, scales.width)


@dataclass(frozen=True)
class PackedNVFP4:
    """A matrix as NVFP4 stores it."""

    packed: UInt8[Tensor, "M half"]
    """Two codes a byte."""
    scales: Scales
    columns: int

    def unpack(self) -> NVFP4:
        """Return the form that is computed with."""
        return NVFP4(decode_e2m1(self.codes), self.scales)

    @property
    def codes(self) -> UInt8[Tensor, "M K"]:
        """A code a byte."""
        return unpack_e2m1(self.packed)[:, : self.columns].contiguous()


def quantize(
    x: Float[Tensor, "M K"],
    *,
    height: int = 1,
    width: int = BLOCK,
    groups: Groups | None = None,
    amax: Float[Tensor, " G"] | None = None,
    bits: UInt8[Tensor, "M K"] | None = None,
) -> NVFP4:
    """Quantize a matrix in blocks of 16 along either dimension, or in squares of 16 by 16.

    `groups` says which rows are tensors of their own, padded to whole blocks. `amax` is the
    largest magnitude of each when it is known over more than this matrix; `bits` gives each element
    8 random bits for stochastic rounding, without them it is rounded to nearest even.
    """
    groups = Groups((x.shape[0],)) if groups is None else groups
    wide = x.float().contiguous()
    blocks = block_amax(wide, height, width)
    amax = groups.largest(blocks, height) if amax is None else amax
    folded, decode = global_factors(amax, groups, height)
    scales = to_fp8((blocks * folded).clamp_(max=FLT_MAX), E4M3)
    # one over a zero scale is infinite: such a block decodes to zeros, whatever its codes are
    factors = decode_fp8(scales).mul_(decode).reciprocal_().clamp_(max=FLT_MAX)
    y = scale_blocks(wide, factors, height, width)
    elements = round_e2m1(y) if bits is None else round_e2m1_stochastically(y, bits)
    return NVFP4(elements, Scales(scales.view(torch.uint8), amax, groups, height, width))


def global_factors(
    amax: Float[Tensor, " G"], groups: Groups, height: int
) -> tuple[Float[Tensor, "rows 1"], Float[Tensor, "rows 1"]]:
    """Return for each row of blocks its tensor's encode scale over 6, and its decode scale."""
    encode = _global_encode_scale(amax)
    folded = groups.spread(encode * _reciprocal(E2M1_MAX), height)
    return folded, groups.spread(1 / encode, height)


def _global_encode_scale(amax: Tensor) -> Tensor:
    scale = divide(GLOBAL_MAX, amax.float()).clamp(max=FLT_MAX)
    return torch.where((amax == 0) | (scale == 0), 1.0, scale)


def _reciprocal(value: float) -> float:
    """Return what float32 holds of 1 / value."""
    return torch.tensor(value, dtype=torch.float32).reciprocal().item()
