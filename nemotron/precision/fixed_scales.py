"""Weights and inputs of linear layers, rounded by the fixed scales of a quantized model.

Weights may also be those of several experts, stacked, with scales that `stack` put together.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.precision import nvfp4
from nemotron.precision.formats import E4M3, decode_fp8, to_fp8
from nemotron.precision.scales import LinearScales
from nemotron.precision.stored import dequantize_weight, quantize_weight

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


def round_weight(weight: Float[Tensor, "*E N K"], scales: LinearScales) -> Float[Tensor, "*E N K"]:
    """Return the values that a weight has after it was stored."""
    if scales.format == "fp8":
        factors = scales.weight_scale[..., None, None]
        return dequantize_weight(quantize_weight(weight, "fp8", factors), "fp8", factors)
    assert scales.weight_scale_2 is not None, "NVFP4 has a scale of the tensor"
    outer = scales.weight_scale_2[..., None, None]
    factors = (decode_fp8(scales.weight_scale) * outer).flatten(0, -2)
    stored = quantize_weight(weight.flatten(0, -2), "nvfp4", factors)
    return dequantize_weight(stored, "nvfp4", factors).view(weight.shape)


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
