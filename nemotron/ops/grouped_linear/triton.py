"""Products of experts' rows by Triton kernels; the weight's gradient keeps its float32 sums.

torch's grouped product rounds that gradient to bfloat16, and another pass converts it.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron.ops.grouped_linear import triton_kernels as kernels
from nemotron.ops.grouped_linear.tiles import Plan, plan
from nemotron.ops.rounded import rounded


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        x, narrow = x.contiguous(), rounded(weight, x.dtype).contiguous()
        at = plan(counts, x.shape[0])
        ctx.save_for_backward(x, narrow, at.bounds)
        ctx.groups, ctx.dtype = at.groups, weight.dtype
        return kernels.multiply(x, narrow, at)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, narrow, bounds = ctx.saved_tensors
        dy, at = dy.contiguous(), Plan(bounds, ctx.groups, x.shape[0])
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = kernels.multiply_back(dy, narrow, at)
        if ctx.needs_input_grad[1]:
            dw = kernels.multiply_columnwise(dy, x, at, ctx.dtype)
        return dx, dw, None


class _GroupedMLP(torch.autograd.Function):
    """Of what has the experts' width, only the rows before the activation are kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, up: Tensor, down: Tensor, counts: Tensor
    ) -> Tensor:
        x, weights = x.contiguous(), weights.contiguous()
        narrow_up, narrow_down = (rounded(w, x.dtype).contiguous() for w in (up, down))
        at = plan(counts, x.shape[0])
        hidden, activated = kernels.activate(x, narrow_up, weights, at)
        ctx.save_for_backward(x, weights, narrow_up, narrow_down, hidden, at.bounds)
        ctx.groups, ctx.dtypes = at.groups, (up.dtype, down.dtype)
        return kernels.multiply(activated, narrow_down, at)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, up, down, hidden, bounds = ctx.saved_tensors
        dy, at = dy.contiguous(), Plan(bounds, ctx.groups, x.shape[0])
        wants_x, _, wants_up, wants_down, _ = ctx.needs_input_grad
        dx = d_up = d_down = None
        d_hidden, activated, d_weights = kernels.slopes(dy, down, hidden, weights, at)
        if wants_down:
            d_down = kernels.multiply_columnwise(dy, activated, at, ctx.dtypes[1])
        del activated
        if wants_up:
            d_up = kernels.multiply_columnwise(d_hidden, x, at, ctx.dtypes[0])
        if wants_x:
            dx = kernels.multiply_back(d_hidden, up, at)
        return dx, d_weights, d_up, d_down, None


def grouped_linear(
    x: Float[Tensor, "R K"], weight: Float[Tensor, "E N K"], counts: Int[Tensor, " E"]
) -> Float[Tensor, "R N"]:
    """All products in one launch each way."""
    return _GroupedLinear.apply(x, weight, counts)


def grouped_mlp(
    x: Float[Tensor, "R I"],
    weights: Float[Tensor, "R 1"],
    up: Float[Tensor, "E F I"],
    down: Float[Tensor, "E I F"],
    counts: Int[Tensor, " E"],
) -> Float[Tensor, "R I"]:
    """Two launches forward and four backward, for all experts at once."""
    return _GroupedMLP.apply(x, weights, up, down, counts)
