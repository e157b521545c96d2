"""A linear layer, and those of all experts at once, whose three products are quantised."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.grouped_linear.loop import groups_of
from nemotron.precision.schemes import Draw, Kept, Scheme, multiply


class _Linear(torch.autograd.Function):
    """Y = X Wᵀ from quantised operands; of X only the quantised form is kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scheme: Scheme, draw: Draw | None) -> Tensor:
        row, turned = scheme.weight(weight.to(torch.bfloat16))
        ctx.weight, ctx.scheme, ctx.draw = turned, scheme, draw
        ctx.activation = scheme.kept_activation(x) if ctx.needs_input_grad[1] else None
        ctx.weight_dtype = weight.dtype
        return multiply(scheme.activation(x), row).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        row, turned = ctx.scheme.gradient(dy, ctx.draw)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = multiply(row, ctx.weight.operand()).to(dy.dtype)
        if ctx.activation is not None:
            dw = multiply(turned, ctx.activation.operand()).to(ctx.weight_dtype)
        return dx, dw, None, None


class _GroupedLinear(torch.autograd.Function):
    """The same for rows sorted by expert; each expert's rows are a tensor of their own."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        counts: Tensor,
        scheme: Scheme,
        draw: Draw | None,
    ) -> Tensor:
        ctx.shape, ctx.weight_dtype = weight.shape, weight.dtype
        ctx.scheme, ctx.draw = scheme, draw
        y = x.new_empty(x.shape[0], weight.shape[1])
        ctx.groups = []
        for expert, rows in groups_of(counts):
            row, turned = scheme.weight(weight[expert].to(torch.bfloat16))
            kept = scheme.kept_activation(x[rows]) if ctx.needs_input_grad[1] else None
            ctx.groups.append((expert, rows, turned, kept))
            y[rows] = multiply(scheme.activation(x[rows]), row).to(x.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        dx = dy.new_empty(dy.shape[0], ctx.shape[2]) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            dw = dy.new_zeros(ctx.shape, dtype=ctx.weight_dtype)
        expert: int
        rows: slice
        weight: Kept
        for expert, rows, weight, activation in ctx.groups:
            draw = ctx.draw
            if draw is not None:
                draw = Draw(draw.key, draw.first_token + rows.start)
            row, turned = ctx.scheme.gradient(dy[rows], draw)
            if dx is not None:
                dx[rows] = multiply(row, weight.operand()).to(dy.dtype)
            if dw is not None:
                dw[expert] = multiply(turned, activation.operand())
        return dx, dw, None, None, None


def quantized_linear(
    x: Float[Tensor, "M K"],
    weight: Float[Tensor, "N K"],
    scheme: Scheme,
    draw: Draw | None = None,
) -> Float[Tensor, "M N"]:
    """Return X Wᵀ in the dtype of `x`, with gradients from quantised operands.

    The float32 master weight is rounded to bfloat16 first, as Transformer Engine does. `draw`
    names the random bits of the gradient's rounding; without it gradients round to nearest.
    """
    return _Linear.apply(x, weight, scheme, draw)


def quantized_grouped_linear(
    x: Float[Tensor, "R K"],
    weight: Float[Tensor, "E N K"],
    counts: Int[Tensor, " E"],
    scheme: Scheme,
    draw: Draw | None = None,
) -> Float[Tensor, "R N"]:
    """Multiply the first counts[0] rows by weight[0]ᵀ, the next by weight[1]ᵀ, … as above.

    An expert without rows is skipped; its gradient is zero.
    """
    return _GroupedLinear.apply(x, weight, counts, scheme, draw)
