"""The float32 product of bfloat16 activations as a bfloat16 product, three times as long.

A float32 number is the sum of three bfloat16 numbers, and products of bfloat16 numbers are exact in
float32, in which matrix units add them up. So the units for bfloat16 take the place of those for
float32, which are a tenth as fast, and the activations need no float32 copy.

Source: Henry, Tang & Heinecke 2019, "Leveraging the bfloat16 Artificial Intelligence Datatype For
Higher-Precision Computations".
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.ops.linear.float32_gradient import mm_float32
from nemotron.ops.registry import Backend


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        parts = _three_parts(weight.float(), 0)  # [3, N, K]
        y = mm_float32(x, parts.flatten(0, 1).T)
        return y.unflatten(1, (3, -1)).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        parts = _three_parts(grad, 1)  # [M, 3, N]
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            # rounded to bfloat16 in the end, so of nine products the three largest are enough
            high, low = parts[:, 0], parts[:, 1]
            weight_high, weight_low, _ = _three_parts(weight.float(), 0)
            grads = torch.cat([high, low, high], dim=1)
            grad_x = grads @ torch.cat([weight_high, weight_high, weight_low])
        if ctx.needs_input_grad[1]:
            grad_weight = mm_float32(parts.flatten(1).T, x)
            grad_weight = grad_weight.unflatten(0, (3, -1)).sum(0).to(weight.dtype)
        return grad_x, grad_weight


def _three_parts(x: Float[Tensor, "A B"], dim: int) -> Tensor:
    """Return three bfloat16 numbers for each of x, along a new dimension, that add up to it."""
    shape = list(x.shape)
    shape.insert(dim, 3)
    parts = x.new_empty(shape, dtype=torch.bfloat16)
    for part in parts.unbind(dim):
        part.copy_(x)
        x = x - part
    return parts


def wide_linear(x: Float[Tensor, "M K"], weight: Float[Tensor, "N K"]) -> Float[Tensor, "M N"]:
    """The reference's product, as exact; the gradient of x is rounded to bfloat16 once."""
    return _WideLinear.apply(x, weight)


backend = Backend(
    "split",
    wide_linear,
    devices=frozenset({"cuda"}),
    dtypes=frozenset({torch.bfloat16}),
)
