"""Weights of linear layers in FP8 and NVFP4 as files hold them: quantized by scales that are given.

A value is `element * factor`, in float32: the factor of an FP8 matrix is its scale (or that of a
row), the factor of a block of NVFP4 its E4M3 scale times the scale of the tensor.
Source: NVIDIA/Model-Optimizer: modelopt/torch/quantization/qtensor/{fp8,nvfp4}_tensor.py.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.precision.blocks import scale_blocks
from nemotron.precision.formats import (
    E4M3,
    decode_e2m1,
    decode_fp8,
    encode_e2m1,
    pack_e2m1,
    round_e2m1,
    to_fp8,
    unpack_e2m1,
)
from nemotron.precision.nvfp4 import BLOCK
from nemotron.precision.scales import LinearScales, StoredFormat

SIGNIFICANDS = tuple(range(8, 16))
"""Of the numbers that E4M3 holds, in eighths."""
CANDIDATES = 4096
"""Neighbors of a scale among which `invertible_scale` finds one; about every fifth is."""


def factors_of(scales: LinearScales) -> Float[Tensor, "*factors"]:
    """Return what elements are multiplied by: a scalar, or one factor for each block of a row."""
    if scales.format == "fp8":
        return scales.weight_scale.float().reshape(())
    assert scales.weight_scale_2 is not None, "NVFP4 has a scale of the tensor"
    return decode_fp8(scales.weight_scale) * scales.weight_scale_2.float().reshape(())


def quantize_weight(
    weight: Float[Tensor, "N K"], format: StoredFormat, factors: Float[Tensor, "*factors"]
) -> Tensor:
    """Return the weight as it is stored: E4M3 [N, K], or two E2M1 codes a byte [N, K / 2].

    Elements are the weight divided by the factors, rounded to nearest even; where a factor is 0,
    so are the elements.
    """
    wide = weight.float()
    if format == "fp8":
        return to_fp8(wide / factors, E4M3)
    elements = wide.view(*factors.shape, BLOCK) / factors.unsqueeze(-1)
    elements = elements.masked_fill((factors == 0).unsqueeze(-1), 0.0)
    return pack_e2m1(encode_e2m1(round_e2m1(elements)).view(weight.shape))


def dequantize_weight(
    stored: Tensor, format: StoredFormat, factors: Float[Tensor, "*factors"]
) -> Float[Tensor, "N K"]:
    """Return the values of a stored weight."""
    if format == "fp8":
        return decode_fp8(stored) * factors
    return scale_blocks(decode_e2m1(unpack_e2m1(stored)), factors, 1, BLOCK)


def fake_quantize_weight(
    weight: Float[Tensor, "N K"], scales: LinearScales
) -> Float[Tensor, "N K"]:
    """Return the values that a reader of the stored weight computes with."""
    factors = factors_of(scales)
    return dequantize_weight(
        quantize_weight(weight, scales.format, factors), scales.format, factors
    )


def invertible_scale(scale: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return the next float32 from `scale` on that survives being stored as its reciprocal.

    compressed-tensors' layout holds the reciprocal of NVFP4's `weight_scale_2`, by which its
    readers divide or whose reciprocal they multiply by. For four scales of five that gives other
    bits than the scale itself; a good one is mostly less than a few hundred units in the last
    place larger. With it, a weight has the same float32 values in every layout and every reader.
    """
    start = scale.float().reshape(1).view(torch.int32)
    found = (start + torch.arange(CANDIDATES, dtype=torch.int32)).view(torch.float32)
    inverse = found.reciprocal()
    eighths = torch.tensor(SIGNIFICANDS, dtype=torch.float32).unsqueeze(1)
    good = (eighths / inverse == eighths * found).all(0) & (inverse.reciprocal() == found)
    index = int(good.int().argmax())
    return found[index] if good[index] else scale.float()
