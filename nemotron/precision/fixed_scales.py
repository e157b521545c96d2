"""Linear layers as quantized checkpoints store them: weights and inputs rounded by fixed scales.

The order of the float32 operations is that of ModelOpt, which writes such checkpoints, not that of
Transformer Engine. All functions also take the matrices of several experts at once, stacked, with
scales that `stack` put together.
Source: modelopt/torch/quantization/qtensor/nvfp4_tensor.py and fp8_tensor.py of
NVIDIA/Model-Optimizer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.precision import nvfp4
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
from nemotron.precision.scales import LinearScales

BITS = {"bf16": 16.0, "fp8": 8.0, "nvfp4": 4.5}
"""Of a weight on disk, with its share of the scale of 16 neighbors."""


def stack(experts: Sequence[LinearScales]) -> LinearScales:
    """Return the scales of several matrices of one format as one, with a dimension of experts."""
    first = experts[0]

    def together(pick: Callable[[LinearScales], Tensor | None]) -> Tensor | None:
        found = [value for own in experts if (value := pick(own)) is not None]
        return torch.stack(found) if found else None

    return LinearScales(
        first.format,
        torch.stack([own.weight_scale for own in experts]),
        together(lambda own: own.weight_scale_2),
        together(lambda own: own.input_scale),
    )


def encode(weight: Float[Tensor, "*E N K"], scales: LinearScales) -> Tensor:
    """Return a weight as it is stored: E4M3 [*E, N, K], or in bytes of two codes [*E, N, K / 2]."""
    divided = weight.float() / _factors(scales, weight.shape)
    if scales.format == "fp8":
        return to_fp8(divided, E4M3)
    # what a scale of zero divides is stored as zeros, which it stands for
    return pack_e2m1(encode_e2m1(round_e2m1(divided.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))))


def decode(stored: Tensor, scales: LinearScales) -> Float[Tensor, "*E N K"]:
    """Return the float32 values of what `encode` returned."""
    is_fp8 = scales.format == "fp8"
    values = decode_fp8(stored) if is_fp8 else decode_e2m1(unpack_e2m1(stored))
    return values * _factors(scales, values.shape)


def round_weight(weight: Float[Tensor, "*E N K"], scales: LinearScales) -> Float[Tensor, "*E N K"]:
    """Return the values that a weight has after it was stored."""
    return decode(encode(weight, scales), scales)


def round_input(x: Float[Tensor, "M K"], scales: LinearScales) -> Float[Tensor, "M K"]:
    """Return the float32 values that engines multiply; those of the input without a scale for it.

    NVFP4 finds the scales of its blocks anew for each input, within the fixed one.
    """
    if scales.input_scale is None:
        return x.float()
    if scales.format == "fp8":
        return round_fp8(x, scales.input_scale)
    amax = scales.input_scale.reshape(1) * nvfp4.GLOBAL_MAX
    return nvfp4.quantize(x, amax=amax).dequantize()


def round_fp8(x: Float[Tensor, "*shape"], scale: Float[Tensor, ""]) -> Float[Tensor, "*shape"]:
    """Return the float32 values of a tensor in E4M3 with one fixed scale."""
    return decode_fp8(to_fp8(x.float() / scale, E4M3)) * scale


class StraightThrough(torch.autograd.Function):
    """The rounded values forward; their gradient backward as that of the values themselves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].to(ctx.dtype), None


def _factors(scales: LinearScales, shape: torch.Size) -> Tensor:
    """Return what the elements of a matrix are multiplied by, in a shape that fits it."""
    if scales.format == "fp8":
        return scales.weight_scale[..., None, None]
    assert scales.weight_scale_2 is not None, "NVFP4 has a scale for the tensor"
    blocks = scales.weight_scale.float() * scales.weight_scale_2[..., None, None]
    return blocks.repeat_interleave(nvfp4.BLOCK, -1)[..., : shape[-1]]
