"""The product whose weight gradient leaves the matrix units in float32, never rounded to bfloat16.

torch would write that gradient in bfloat16 and convert it in another pass over the matrix.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nemotron.ops.registry import Backend
from nemotron.ops.rounded import rounded


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        narrow = rounded(weight, x.dtype)
        ctx.save_for_backward(x, narrow)
        return F.linear(x, narrow)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, narrow = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ narrow
        if ctx.needs_input_grad[1]:
            rows = grad.reshape(-1, grad.shape[-1])
            grad_weight = mm_float32(rows.T, x.reshape(-1, x.shape[-1]))
        return grad_x, grad_weight


def mm_float32(a: Float[Tensor, "M K"], b: Float[Tensor, "K N"]) -> Float[Tensor, "M N"]:
    """Multiply bfloat16 matrices into a float32 one, which torch can do on CUDA devices only."""
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def linear(x: Float[Tensor, "*batch K"], weight: Float[Tensor, "N K"]) -> Float[Tensor, "*batch N"]:
    """Multiply by the weight, rounded to the dtype of `x`; its gradient is float32."""
    return _Linear.apply(x, weight)


backend = Backend(
    "float32_gradient",
    linear,
    devices=frozenset({"cuda"}),
    dtypes=frozenset({torch.bfloat16}),
)
