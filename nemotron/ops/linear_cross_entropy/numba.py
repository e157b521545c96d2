"""Summed cross entropy by kernels for CPUs, its gradient with it; `chunked` takes the rest."""

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron.ops.grouped_linear.numba import Blocks, Sizes, readable
from nemotron.ops.jit.call import kernels, run, workspace
from nemotron.ops.jit.matrices import ROWS
from nemotron.ops.jit.vectors import LANES
from nemotron.ops.linear_cross_entropy import CHUNK_ELEMENTS, IGNORED, chunked

MODULE = "nemotron.ops.linear_cross_entropy.kernels"


class _SummedLoss(torch.autograd.Function):
    """The gradient is computed with the loss, of rows that have a label, and scaled later."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        recorded: bool,
    ) -> Tensor:
        kept = (labels != IGNORED).nonzero().squeeze(1)
        # without a record, a parameter would still ask for its gradient
        needs_hidden, needs_weight = (recorded and needs for needs in ctx.needs_input_grad[:2])
        make = torch.empty if kept.numel() else torch.zeros
        dx = make(kept.shape[0], hidden.shape[1]) if needs_hidden else None
        dweight = make(weight.shape) if needs_weight else None
        loss = torch.zeros(())
        if kept.numel():
            values: dict[str, Any] = {"labels": labels[kept], "loss": loss}
            if dx is not None:
                values["dx"] = dx
            if dweight is not None:
                values["dweight"] = dweight
            if weights is not None:
                values["shares"] = weights[kept].float()
            _check(values["labels"], weight.shape[0])
            _compute(hidden[kept], weight.contiguous(), values)
        ctx.save_for_backward(kept, dx, dweight)
        ctx.hidden, ctx.weight = (hidden.shape, hidden.dtype), weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, dx, dweight = ctx.saved_tensors
        if dx is not None:
            shape, dtype = ctx.hidden
            dx = torch.zeros(shape, dtype=dtype).index_copy_(0, kept, (dx * grad).to(dtype))
        if dweight is not None:
            dweight = (dweight * grad).to(ctx.weight)
        return dx, dweight, None, None, None


def _check(labels: Tensor, vocab: int) -> None:
    for label in (int(labels.min()), int(labels.max())):
        if not 0 <= label < vocab:
            raise IndexError(f"label {label} is outside of a vocabulary of {vocab} tokens")


def _compute(x: Tensor, weight: Tensor, values: dict[str, Any]) -> None:
    """Fill the results among `values` for rows that all have a label."""
    found, blocks, sizes = kernels(MODULE, x.dtype), Blocks.of((len(x),)), Sizes.of(weight[None])
    threads = torch.get_num_threads()
    together = min(max(CHUNK_ELEMENTS // ROWS // len(weight), threads), len(blocks.table))
    chunks = -(-len(blocks.table) // together)
    counters = torch.zeros(1 + 2 * chunks, dtype=torch.int64)
    losses = torch.empty(len(x), dtype=torch.float64)
    room = workspace(
        max(sizes.inner * ROWS, sizes.result) + 3 * ROWS * LANES,
        transposed=sizes.matrices,
        straight=sizes.matrices if "dx" in values else 0,
        slopes=together * ROWS * sizes.outer,
        rows=together * ROWS * sizes.inner,
    )
    numbers = {"inner": x.shape[1], "vocab": len(weight), "groups": 1, "count": len(x)}
    numbers |= {"together": together, "wide": weight.dtype != x.dtype}
    tensors = {"x": x, "weight": weight, "losses": losses}
    values = blocks.inputs() | numbers | tensors | room | values | {"next": counters}
    run(found.compute_loss, found.CALL, x.dtype, values)


def linear_cross_entropy(
    hidden: Float[Tensor, "M D"],
    weight: Float[Tensor, "V D"],
    labels: Int[Tensor, " M"],
    reduction: Literal["sum", "none"],
    weights: Float[Tensor, " M"] | None = None,
) -> Tensor:
    """The reference's sum, its products in float32; losses one by one are those of `chunked`.

    So are sums where ranks share the vocabulary. What follows a product is never rounded.
    """
    if reduction == "none":
        return chunked(hidden, weight, labels, reduction, weights)
    weight = readable(weight, hidden.dtype)
    return _SummedLoss.apply(hidden, weight, labels, weights, torch.is_grad_enabled())
