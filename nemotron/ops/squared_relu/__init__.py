"""The activation of feed-forward layers and experts."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.device import row_blocks
from nemotron.ops.registry import Backend, Operation, numba_backend, triton_backend


class SquaredReLUOp(Operation):
    """Return relu(x)² in the dtype of `x`; of a matrix, times a float32 `weight` for each row.

    The weighted square is taken in float32 and rounded once, as Megatron-LM's fused kernel does.
    Source: So et al. 2021, "Primer"; for the weight, NVIDIA/Megatron-LM:
    megatron/core/fusions/fused_weighted_squared_relu.py.
    """

    def __call__(
        self, x: Float[Tensor, "*batch F"], weight: Float[Tensor, "*batch 1"] | None = None
    ) -> Float[Tensor, "*batch F"]:
        return self.select(x)(x, weight)


def reference(
    x: Float[Tensor, "*batch F"], weight: Float[Tensor, "*batch 1"] | None
) -> Float[Tensor, "*batch F"]:
    """relu(x)², times the weight of the row if there is one, in float32 or wider."""
    square = x.to(torch.promote_types(x.dtype, torch.float32)).relu().square()
    return (square if weight is None else square * weight).to(x.dtype)


class _SquaredReLU(torch.autograd.Function):
    """relu(x)²; only `x` is kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.relu().square_()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x.relu().mul_(grad).mul_(2)


class _WeightedSquaredReLU(torch.autograd.Function):
    """relu(x)² times a weight per row, in the weight's dtype inside, rounded once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        result = torch.empty_like(x)
        for x_rows, weight_rows, result_rows in row_blocks(x, weight, result):
            y = x_rows.to(weight.dtype).relu()
            result_rows.copy_(y.square_().mul_(weight_rows))
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        for x_rows, weight_rows, grad_rows, grad_x_rows, grad_weight_rows in row_blocks(
            x, weight, grad, grad_x, grad_weight
        ):
            y = x_rows.to(weight.dtype).relu()
            product = y * grad_rows
            torch.sum(y.mul_(product), -1, keepdim=True, out=grad_weight_rows)
            grad_x_rows.copy_(product.mul_(weight_rows * 2))
        return grad_x, grad_weight


def blocked(
    x: Float[Tensor, "*batch F"], weight: Float[Tensor, "*batch 1"] | None
) -> Float[Tensor, "*batch F"]:
    """The reference's formula in blocks of rows, with a gradient that keeps only the inputs.

    Without a weight it is computed in the dtype of `x`, which rounds once as well.
    """
    if weight is not None:
        return _WeightedSquaredReLU.apply(x, weight)
    return _SquaredReLU.apply(x) if torch.is_grad_enabled() else x.relu().square_()


squared_relu = SquaredReLUOp(
    "squared_relu",
    [
        triton_backend(
            "nemotron.ops.squared_relu.triton",
            "squared_relu",
        ),
        numba_backend("nemotron.ops.squared_relu.numba", "squared_relu"),
        Backend("blocked", blocked),
        Backend("reference", reference),
    ],
)
