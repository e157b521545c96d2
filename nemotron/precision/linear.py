"""A linear layer, and those of all experts at once, whose three products are quantized."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.rounded import fresh_copy
from nemotron.precision.groups import Sizes, expert_chunks
from nemotron.precision.random_bits import Draw
from nemotron.precision.schemes import Quantized, Scheme, multiply

Product = Callable[[Quantized, Quantized, Sequence[Tensor]], None]
"""Writes left rightᵀ of each tensor into its output, summed in float32 and rounded once."""
T = TypeVar("T")


class _Linear(torch.autograd.Function):
    """Y = X Wᵀ from quantized operands, for each expert's rows or for all rows as one.

    Experts are taken some at a time. Of X only the quantized form is kept for backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "R K"],
        weight: Float[Tensor, "E N K"],
        sizes: Sizes,
        scheme: Scheme,
        draw: Draw | None,
        product: Product,
        is_training: bool,
        copy: Tensor | None,
    ) -> Float[Tensor, "R N"]:
        ctx.scheme, ctx.draw, ctx.product = scheme, draw, product
        ctx.shape, ctx.weight_dtype = weight.shape, weight.dtype
        ctx.chunks = expert_chunks(sizes, weight)
        keep = is_training and ctx.needs_input_grad[1]
        y = x.new_empty(x.shape[0], weight.shape[1])
        kept: list[tuple[Quantized | None, Quantized | None]] = []
        saved: list[Tensor] = []
        for chunk in ctx.chunks:
            own, rows = scheme.for_experts(chunk.experts), x[chunk.rows]
            matrices = weight[chunk.experts] if copy is None else copy[chunk.experts]
            narrow = matrices.to(torch.bfloat16).flatten(0, 1)
            outputs = (weight.shape[1],) * len(chunk.sizes)
            if is_training:
                own.remember("x", rows, chunk.sizes)
                own.remember("w", narrow, outputs)
            row, activation = own.quantize("x", rows, chunk.sizes, both=keep)
            weight_row, columnwise = own.quantize("w", narrow, outputs, both=is_training)
            kept.append(
                (activation and _save(activation, saved), columnwise and _save(columnwise, saved))
            )
            product(row, weight_row, y[chunk.rows].split(chunk.sizes))
        ctx.kept = kept
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = dy.new_empty(dy.shape[0], ctx.shape[2])
        if ctx.needs_input_grad[1]:
            dw = dy.new_empty(ctx.shape, dtype=ctx.weight_dtype)
        for chunk, (activation, weight) in zip(ctx.chunks, ctx.kept, strict=True):
            own, rows = ctx.scheme.for_experts(chunk.experts), dy[chunk.rows]
            draw = ctx.draw and ctx.draw.for_rows(chunk.rows)
            own.remember("dy", rows, chunk.sizes)
            row, columnwise = own.quantize("dy", rows, chunk.sizes, draw=draw)
            if dx is not None:
                ctx.product(row, _restore(weight, saved), dx[chunk.rows].split(chunk.sizes))
            if dw is not None:
                ctx.product(columnwise, _restore(activation, saved), dw[chunk.experts].unbind())
        return dx, dw, None, None, None, None, None, None


def quantized_linear(
    x: Float[Tensor, "M K"],
    weight: Float[Tensor, "N K"],
    scheme: Scheme,
    draw: Draw | None = None,
    product: Product = multiply,
) -> Float[Tensor, "M N"]:
    """Return X Wᵀ in the dtype of `x`, with gradients from quantized operands.

    The float32 master weight is rounded to bfloat16 first, as Transformer Engine does. `draw`
    names the random bits of the gradient's rounding; without it gradients round to nearest.
    """
    sizes = (x.shape[0],)
    is_training, copy = torch.is_grad_enabled(), fresh_copy(weight, torch.bfloat16)
    copy = None if copy is None else copy.unsqueeze(0)
    return _Linear.apply(x, weight.unsqueeze(0), sizes, scheme, draw, product, is_training, copy)


def quantized_grouped_linear(
    x: Float[Tensor, "R K"],
    weight: Float[Tensor, "E N K"],
    counts: Int[Tensor, " E"],
    scheme: Scheme,
    draw: Draw | None = None,
    product: Product = multiply,
) -> Float[Tensor, "R N"]:
    """Multiply the first counts[0] rows by weight[0]ᵀ, the next by weight[1]ᵀ, … as above.

    Each expert's rows and matrix are tensors of their own. One without rows has the gradient zero.
    """
    sizes, copy = tuple(counts.tolist()), fresh_copy(weight, torch.bfloat16)
    return _Linear.apply(x, weight, sizes, scheme, draw, product, torch.is_grad_enabled(), copy)


@dataclass(frozen=True)
class _SavedTensor:
    """Stands for a tensor that autograd saves: its index in the list of those."""

    index: int


def _save(value: T, tensors: list[Tensor]) -> T:
    """Return a dataclass whose tensors are replaced by indices, and append them to the list.

    Autograd can free or recompute only those tensors that it is given.
    """
    changes: dict[str, Any] = {}
    for name, held in _fields(value):
        if isinstance(held, Tensor):
            changes[name] = _SavedTensor(len(tensors))
            tensors.append(held)
        elif is_dataclass(held):
            changes[name] = _save(held, tensors)
    return replace(value, **changes)  # type: ignore[type-var]


def _restore(value: T, tensors: Sequence[Tensor]) -> T:
    """Return the dataclass that `_save` was given."""
    changes: dict[str, Any] = {}
    for name, held in _fields(value):
        if isinstance(held, _SavedTensor):
            changes[name] = tensors[held.index]
        elif is_dataclass(held):
            changes[name] = _restore(held, tensors)
    return replace(value, **changes)  # type: ignore[type-var]


def _fields(value: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(value, field.name)) for field in fields(value)]
