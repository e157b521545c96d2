"""The product of bfloat16 activations in float32, on CPUs that do not multiply bfloat16.

What is kept for the backward pass is bfloat16. The gradient of the weight stays float32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nemotron.ops import float32_products
from nemotron.ops.rounded import rounded


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), rounded(weight, x.dtype).float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wide = grad.float()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (wide @ rounded(weight, x.dtype).float()).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = wide.reshape(-1, wide.shape[-1]).T @ x.reshape(-1, x.shape[-1]).float()
        return grad_x, grad_weight


def linear(x: Float[Tensor, "*batch K"], weight: Float[Tensor, "N K"]) -> Float[Tensor, "*batch N"]:
    """Multiply by the weight, rounded to the dtype of `x`; its gradient is float32."""
    return _Linear.apply(x, weight)


backend = float32_products.backend(linear, features=frozenset({"same_dtype"}))
