"""Squared-ReLU feed-forward: the dense layer `-` and the shared expert."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nemotron.model.linear import Linear


class _SquaredReLU(torch.autograd.Function):
    """relu(x)² times an optional weight per row; only `x` and the weight are kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = x.relu()
        if weight is None:
            return y.square_()
        # float32 product, rounded once, as Megatron-LM's fused weighted squared ReLU does
        return (y.to(weight.dtype).square_() * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        y = x.relu()
        if weight is None:
            return y.mul_(grad).mul_(2), None
        y, grad = y.to(weight.dtype), grad.to(weight.dtype)
        product = y * grad
        grad_weight = (product * y).sum(-1, keepdim=True) if ctx.needs_input_grad[1] else None
        return (product.mul_(2) * weight).to(x.dtype), grad_weight


def squared_relu(
    x: Float[Tensor, "*batch F"], weight: Float[Tensor, "*batch 1"] | None = None
) -> Float[Tensor, "*batch F"]:
    """Return relu(x)², times `weight` (float32) when it is given, in the dtype of `x`."""
    return _SquaredReLU.apply(x, weight)


class MLP(nn.Module):
    """down(relu(up(x))²): no gate, no bias."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return self.down_proj(squared_relu(self.up_proj(x)))
