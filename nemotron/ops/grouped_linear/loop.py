"""One product per expert that has rows, written into one output; on CPUs the fastest there is."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.registry import Backend


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.groups = groups_of(counts)
        y = x.new_empty(x.shape[0], weight.shape[1])
        for expert, rows in ctx.groups:
            torch.mm(x[rows], weight[expert].T, out=y[rows])
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x)
            for expert, rows in ctx.groups:
                torch.mm(grad[rows], weight[expert], out=grad_x[rows])
        if ctx.needs_input_grad[1]:
            used = len(ctx.groups) == weight.shape[0]
            grad_weight = torch.empty_like(weight) if used else torch.zeros_like(weight)
            for expert, rows in ctx.groups:
                torch.mm(grad[rows].T, x[rows], out=grad_weight[expert])
        return grad_x, grad_weight, None


def groups_of(counts: Tensor) -> list[tuple[int, slice]]:
    """Return each expert that has rows, with its rows; waits for the device of the counts."""
    groups, start = [], 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            groups.append((expert, slice(start, start + count)))
        start += count
    return groups


def grouped_linear(
    x: Float[Tensor, "R K"], weight: Float[Tensor, "E N K"], counts: Int[Tensor, " E"]
) -> Float[Tensor, "R N"]:
    """The reference's products without copies of the parts."""
    return _GroupedLinear.apply(x, weight, counts)


backend = Backend("loop", grouped_linear)
