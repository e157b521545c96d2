"""FP8 with float32 scales: one for a tensor (current or delayed), or for blocks of 128.

Sources: NVIDIA/TransformerEngine: transformer_engine/common/recipe/recipe_common.cuh;
tests/pytorch/references/blockwise_quantizer_reference.py.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from nemotron.precision.blocks import block_amax, scale_blocks
from nemotron.precision.formats import E4M3, FLT_MAX, FP8, divide, to_fp8

BLOCK = 128


@dataclass(frozen=True)
class ScaledFP8:
    """A matrix in FP8 with the scales that it is divided by."""

    elements: Tensor
    """[M, K] in an FP8 dtype."""
    scale: Float[Tensor, "rows columns"]
    """Encode scales of the blocks; one for the whole tensor with current scaling."""
    scale_inv: Float[Tensor, "rows columns"]
    """Decode scales."""
    height: int
    width: int

    @property
    def codes(self) -> UInt8[Tensor, "M K"]:
        """The elements as bytes."""
        return self.elements.view(torch.uint8)

    def dequantize(self) -> Float[Tensor, "M K"]:
        """Return the values in float32."""
        return scale_blocks(self.elements.float(), self.scale_inv, self.height, self.width)


def quantize_current(
    x: Float[Tensor, "M K"],
    format: FP8 = E4M3,
    *,
    power_of_two: bool = False,
    amax: Float[Tensor, ""] | None = None,
) -> ScaledFP8:
    """Quantise a tensor by its own largest magnitude, or by `amax` where it is known over more."""
    found = x.abs().amax().float() if amax is None else amax
    scale = encode_scale(found.view(1, 1), format, FLT_MAX, power_of_two)
    return _cast(x, format, scale, x.shape[0], x.shape[1])


def quantize_scaled(x: Float[Tensor, "M K"], format: FP8, scale: Float[Tensor, ""]) -> ScaledFP8:
    """Quantise a tensor by a scale from earlier steps."""
    return _cast(x, format, scale.view(1, 1), x.shape[0], x.shape[1])


def quantize_blocks(
    x: Float[Tensor, "M K"],
    format: FP8 = E4M3,
    *,
    square: bool = False,
    power_of_two: bool = True,
) -> ScaledFP8:
    """Quantise a matrix in blocks of 128 along its last dimension, or in squares of 128."""
    height = BLOCK if square else 1
    amax = block_amax(x.float(), height, BLOCK)
    scale = encode_scale(amax, format, torch.finfo(x.dtype).max, power_of_two)
    return _cast(x, format, scale, height, BLOCK)


def encode_scale(
    amax: Float[Tensor, "*shape"], format: FP8, largest: float, power_of_two: bool
) -> Float[Tensor, "*shape"]:
    """Return max / amax, `largest` where that overflows, 1 where there is nothing to scale."""
    scale = divide(format.max, amax)
    scale = scale.masked_fill(scale.isinf(), largest)
    scale = torch.where((amax == 0) | ~amax.isfinite(), 1.0, scale)
    if power_of_two:
        scale = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)
    return scale


def _cast(x: Tensor, format: FP8, scale: Tensor, height: int, width: int) -> ScaledFP8:
    scaled = scale_blocks(x.float(), scale, height, width)
    return ScaledFP8(to_fp8(scaled, format), scale, 1 / scale, height, width)
