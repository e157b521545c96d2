"""Normalisation in blocks of rows; backward keeps the input and one number a row."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.ops.blocks import BLOCK_ELEMENTS, row_blocks
from nemotron.ops.registry import Backend


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        scale = torch.empty(*x.shape[:-1], 1, dtype=wide, device=x.device)
        for x_rows, scale_rows, rows in row_blocks(_rows(x), _rows(scale), _rows(result)):
            x_wide = x_rows.to(wide)
            torch.mean(x_wide.square(), -1, keepdim=True, out=scale_rows)
            scale_rows.add_(eps).rsqrt_()
            rows.copy_((x_wide * scale_rows).mul_(weight))
        ctx.save_for_backward(x, weight, scale)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        wide = scale.dtype
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grad_weight = torch.zeros_like(weight, dtype=wide)
        for x_rows, scale_rows, grad_rows, grad_x_rows in row_blocks(
            _rows(x), _rows(scale), _rows(grad), _rows(grad_x)
        ):
            unit = x_rows.to(wide) * scale_rows
            product = unit * grad_rows
            grad_weight += product.sum(0)
            shared = (product @ weight.to(wide)).unsqueeze(-1).div_(x.shape[-1])
            inner = (grad_rows * weight).to(wide)
            grad_x_rows.copy_(inner.addcmul_(unit, shared, value=-1).mul_(scale_rows))
        return grad_x, grad_weight.to(weight.dtype), None


def _rows(x: Float[Tensor, "*batch D"]) -> Float[Tensor, "M D"]:
    return x.reshape(-1, x.shape[-1])


def inverse_rms(x: Float[Tensor, "*batch D"], eps: float) -> Float[Tensor, "*batch 1"]:
    """Return 1 / sqrt(mean(x²) + eps) in float32 or wider, in few operations."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, 2, -1, True, dtype=wide)
    return norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()


def rms_norm(
    x: Float[Tensor, "*batch D"], weight: Float[Tensor, " D"], eps: float
) -> Float[Tensor, "*batch D"]:
    """The reference's formula, with a hand-written gradient."""
    if x.numel() <= BLOCK_ELEMENTS and not torch.is_grad_enabled():
        return (x * weight).mul_(inverse_rms(x, eps)).to(x.dtype)
    return _RMSNorm.apply(x, weight, eps)


backend = Backend("fused", rms_norm)
