"""Routed experts by kernels for CPUs: what is between the products does not leave the cache."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron.ops.grouped_linear.numba import Blocks, Form, Sizes, readable
from nemotron.ops.jit.call import kernels, run, workspace
from nemotron.ops.jit.matrices import ROWS


class _GroupedMLP(torch.autograd.Function):
    """Of what has the experts' width, only the rows before the activation are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        up: Tensor,
        down: Tensor,
        counts: tuple[int, ...],
        form: Form,
    ) -> Tensor:
        x, up, down = x.contiguous(), up.contiguous(), down.contiguous()
        y, by = torch.empty_like(x), weights.float().contiguous()
        ctx.form, ctx.found = form, kernels(form.module, x.dtype)
        ctx.blocks = Blocks.of(counts)
        ctx.of_weights = weights.dtype
        sizes = Sizes.of(up)
        hidden = x.new_empty(ctx.blocks.rows, sizes.outer)
        ctx.save_for_backward(x, by, up, down, hidden)
        values = _inputs(x, by, up, down, hidden) | ctx.blocks.inputs() | {"y": y}
        run(ctx.found.forward, ctx.found.CALL, x.dtype, values | form.forward(sizes))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, by, up, down, hidden), found = ctx.saved_tensors, ctx.found
        dweights = torch.empty(by.shape)
        values = _inputs(x, by, up, down, hidden) | ctx.blocks.inputs()
        values |= {"dy": dy.contiguous(), "dweights": dweights}
        wants_x, _, wants_up, wants_down, *_ = ctx.needs_input_grad
        dx = dup = ddown = None
        if wants_x:
            values["dx"] = dx = torch.empty_like(x)
        if wants_up:
            values["dup"] = dup = torch.empty(up.shape)
        if wants_down:
            values["ddown"] = ddown = torch.empty(down.shape)
        room = ctx.form.backward(Sizes.of(up), ctx.blocks)
        run(found.backward, found.CALL, x.dtype, values | room)
        dup, ddown = (d if d is None else d.to(up.dtype) for d in (dup, ddown))
        return dx, dweights.to(ctx.of_weights), dup, ddown, None, None


def _inputs(x: Tensor, by: Tensor, up: Tensor, down: Tensor, hidden: Tensor) -> dict[str, Any]:
    groups, outer, inner = up.shape
    sizes = {"groups": groups, "outer": outer, "inner": inner, "wide": up.dtype != x.dtype}
    tensors = {"x": x, "weights": by, "up": up, "down": down, "hidden": hidden}
    return sizes | tensors


def _forward(sizes: Sizes) -> dict[str, Any]:
    scratch = (sizes.inner + sizes.outer) * ROWS + sizes.result
    return workspace(scratch, ups=sizes.matrices, downs=sizes.matrices)


def _backward(sizes: Sizes, blocks: Blocks) -> dict[str, Any]:
    return workspace(
        sizes.result,
        ups=sizes.matrices,
        downs=sizes.matrices,
        slopes=blocks.rows * sizes.inner,
        rows=blocks.rows * sizes.inner,
        inside=blocks.rows * sizes.outer,
        activated=blocks.rows * sizes.outer,
    )


FLOAT32 = Form("nemotron.ops.grouped_mlp.kernels", _forward, _backward)
"""All numbers in float32."""


def grouped_mlp(
    x: Float[Tensor, "R I"],
    weights: Float[Tensor, "R 1"],
    up: Float[Tensor, "E F I"],
    down: Float[Tensor, "E I F"],
    counts: Int[Tensor, " E"],
    form: Form = FLOAT32,
) -> Float[Tensor, "R I"]:
    """The three operations at once; what is between them is rounded as they round it."""
    if up.dtype != down.dtype:
        up, down = up.to(x.dtype), down.to(x.dtype)
    matrices = readable(up, x.dtype), readable(down, x.dtype)
    return _GroupedMLP.apply(x, weights, *matrices, tuple(counts.tolist()), form)
