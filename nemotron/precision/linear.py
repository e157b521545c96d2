"""A linear layer, and those of all experts at once, whose three products are quantised."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.grouped_linear.loop import groups_of
from nemotron.precision.random_bits import Draw
from nemotron.precision.schemes import Quantized, Scheme, multiply

Product = Callable[[Quantized, Quantized, torch.dtype], Tensor]
"""Returns left rightᵀ in a dtype, summed in float32 and rounded once."""


class _Linear(torch.autograd.Function):
    """Y = X Wᵀ from quantised operands; of X only the quantised form is kept for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scheme: Scheme,
        draw: Draw | None,
        product: Product,
        is_training: bool,
    ) -> Tensor:
        if is_training:
            _remember(scheme, x, weight)
        keep = is_training and ctx.needs_input_grad[1]
        y, ctx.weight, ctx.activation = _forward(x, weight, scheme, product, keep)
        ctx.scheme, ctx.draw, ctx.product = scheme, draw, product
        ctx.weight_dtype = weight.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ctx.scheme.remember("dy", dy)
        row, turned = ctx.scheme.gradient(dy, ctx.draw)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = ctx.product(row, ctx.weight, dy.dtype)
        if ctx.needs_input_grad[1]:
            dw = ctx.product(turned, ctx.activation, ctx.weight_dtype)
        return dx, dw, None, None, None, None


class _GroupedLinear(torch.autograd.Function):
    """The same for rows sorted by expert; each expert's rows are a tensor of their own."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        counts: Tensor,
        schemes: Sequence[Scheme],
        draw: Draw | None,
        product: Product,
        is_training: bool,
    ) -> Tensor:
        ctx.shape, ctx.weight_dtype = weight.shape, weight.dtype
        ctx.draw, ctx.product = draw, product
        y = x.new_empty(x.shape[0], weight.shape[1])
        ctx.groups = []
        keep = is_training and ctx.needs_input_grad[1]
        for expert, rows in groups_of(counts):
            scheme = schemes[expert]
            if is_training:
                _remember(scheme, x[rows], weight[expert])
            y[rows], *kept = _forward(x[rows], weight[expert], scheme, product, keep)
            ctx.groups.append((expert, rows, scheme, *kept))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = dy.new_empty(dy.shape[0], ctx.shape[2]) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            dw = dy.new_zeros(ctx.shape, dtype=ctx.weight_dtype)
        expert: int
        rows: slice
        scheme: Scheme
        for expert, rows, scheme, weight, activation in ctx.groups:
            scheme.remember("dy", dy[rows])
            draw = None if ctx.draw is None else ctx.draw.part(rows)
            row, turned = scheme.gradient(dy[rows], draw)
            if dx is not None:
                dx[rows] = ctx.product(row, weight, dy.dtype)
            if dw is not None:
                dw[expert] = ctx.product(turned, activation, dw.dtype)
        return dx, dw, None, None, None, None, None


def _forward(
    x: Tensor, weight: Tensor, scheme: Scheme, product: Product, keep: bool
) -> tuple[Tensor, Quantized, Quantized | None]:
    """Return Y, and what backward needs of W and, where it is kept, of X."""
    row, turned = scheme.weight(weight.to(torch.bfloat16))
    kept = scheme.kept_activation(x) if keep else None
    return product(scheme.activation(x), row, x.dtype), turned, kept


def _remember(scheme: Scheme, x: Tensor, weight: Tensor) -> None:
    scheme.remember("x", x)
    scheme.remember("w", weight.to(torch.bfloat16))


def quantized_linear(
    x: Float[Tensor, "M K"],
    weight: Float[Tensor, "N K"],
    scheme: Scheme,
    draw: Draw | None = None,
    product: Product = multiply,
) -> Float[Tensor, "M N"]:
    """Return X Wᵀ in the dtype of `x`, with gradients from quantised operands.

    The float32 master weight is rounded to bfloat16 first, as Transformer Engine does. `draw`
    names the random bits of the gradient's rounding; without it gradients round to nearest.
    """
    return _Linear.apply(x, weight, scheme, draw, product, torch.is_grad_enabled())


def quantized_grouped_linear(
    x: Float[Tensor, "R K"],
    weight: Float[Tensor, "E N K"],
    counts: Int[Tensor, " E"],
    schemes: Sequence[Scheme],
    draw: Draw | None = None,
    product: Product = multiply,
) -> Float[Tensor, "R N"]:
    """Multiply the first counts[0] rows by weight[0]ᵀ, the next by weight[1]ᵀ, … as above.

    Each expert has a scheme. One without rows is skipped; its gradient is zero.
    """
    is_training = torch.is_grad_enabled()
    return _GroupedLinear.apply(x, weight, counts, schemes, draw, product, is_training)
