"""Squared-ReLU feed-forward: the dense layer `-` and the shared expert."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nemotron.model.linear import Linear
from nemotron.ops.blocks import row_blocks


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
    """relu(x)² times a weight per row: float32 inside, as Megatron-LM's fused kernel, rounded once.

    Source: NVIDIA/Megatron-LM: megatron/core/fusions/fused_weighted_squared_relu.py.
    """

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


def squared_relu(
    x: Float[Tensor, "*batch F"], weight: Float[Tensor, "*batch 1"] | None = None
) -> Float[Tensor, "*batch F"]:
    """Return relu(x)² in the dtype of `x`; of a matrix, times a float32 `weight` for each row."""
    if weight is not None:
        return _WeightedSquaredReLU.apply(x, weight)
    return _SquaredReLU.apply(x) if torch.is_grad_enabled() else x.relu().square_()


class MLP(nn.Module):
    """down(relu(up(x))²): no gate, no bias."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return self.down_proj(squared_relu(self.up_proj(x)))
