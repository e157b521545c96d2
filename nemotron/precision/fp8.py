"""FP8 with float32 scales: one for a tensor (current or delayed), or for blocks of 128.

Sources: NVIDIA/TransformerEngine: transformer_engine/common/recipe/recipe_common.cuh;
tests/pytorch/references/blockwise_quantizer_reference.py.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from nemotron.precision.blocks import block_amax, scale_blocks
from nemotron.precision.formats import E4M3, FLT_MAX, FP8, decode_fp8, divide, to_fp8
from nemotron.precision.groups import Groups

BLOCK = 128


@dataclass(frozen=True)
class ScaledFP8:
    """A matrix in FP8 with the scales that it is divided by."""

    elements: Tensor
    """[M, K] in an FP8 dtype."""
    scale: Float[Tensor, "rows columns"]
    """Encode scales of the blocks."""
    scale_inv: Float[Tensor, "rows columns"]
    """Decode scales."""
    height: int
    width: int
    per_tensor: bool = False
    """Whether each tensor has one scale, repeated in its rows where there are several tensors."""

    @property
    def codes(self) -> UInt8[Tensor, "M K"]:
        """The elements as bytes."""
        return self.elements.view(torch.uint8)

    def dequantize(self) -> Float[Tensor, "M K"]:
        """Return the values in float32."""
        return scale_blocks(decode_fp8(self.elements), self.scale_inv, self.height, self.width)


def quantize_current(
    x: Float[Tensor, "M K"],
    format: FP8 = E4M3,
    *,
    groups: Groups | None = None,
    power_of_two: bool = False,
    amax: Float[Tensor, " G"] | None = None,
) -> ScaledFP8:
    """Quantize by the largest magnitude of each tensor, or by `amax` known over more of it."""
    groups = Groups((x.shape[0],)) if groups is None else groups
    found = groups.amax(x) if amax is None else amax
    scale = encode_scale(found, format, FLT_MAX, power_of_two)
    return quantize_scaled(x, format, scale, groups)


def quantize_scaled(
    x: Float[Tensor, "M K"], format: FP8, scale: Float[Tensor, " G"], groups: Groups
) -> ScaledFP8:
    """Quantize each tensor by a scale that is known already."""
    spread = groups.spread(scale, 1)
    height = 1 if len(groups.sizes) > 1 else max(1, x.shape[0])
    return _cast(x, format, spread, height, x.shape[1], per_tensor=True)


def quantize_blocks(
    x: Float[Tensor, "M K"],
    format: FP8 = E4M3,
    *,
    height: int = 1,
    width: int = BLOCK,
    power_of_two: bool = True,
) -> ScaledFP8:
    """Quantize a matrix in blocks of 128 along either dimension, or in squares of 128 by 128."""
    amax = block_amax(x, height, width)
    scale = encode_scale(amax, format, torch.finfo(x.dtype).max, power_of_two)
    return _cast(x, format, scale, height, width)


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


def _cast(
    x: Tensor, format: FP8, scale: Tensor, height: int, width: int, *, per_tensor: bool = False
) -> ScaledFP8:
    scaled = scale_blocks(x.float().contiguous(), scale, height, width)
    elements = to_fp8(scaled, format)
    return ScaledFP8(elements, scale, 1 / scale, height, width, per_tensor)
