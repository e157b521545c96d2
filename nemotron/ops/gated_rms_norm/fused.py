"""Gate and grouped norm in blocks of rows; backward keeps the inputs and one number a group."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nemotron.ops.blocks import BLOCK_ELEMENTS, row_blocks
from nemotron.ops.registry import Backend
from nemotron.ops.rms_norm.fused import inverse_rms


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
        wide = torch.promote_types(y.dtype, torch.float32)
        result = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        scale = torch.empty(*y.shape[:-1], groups, 1, dtype=wide, device=y.device)
        for y_rows, z_rows, scale_rows, rows in row_blocks(
            _rows(y), _rows(z), scale.flatten(0, -3), _rows(result)
        ):
            gated = F.silu(z_rows.to(wide)).mul_(y_rows).unflatten(-1, (groups, -1))
            torch.mean(gated.square(), -1, keepdim=True, out=scale_rows)
            scale_rows.add_(eps).rsqrt_()
            rows.copy_(gated.mul_(scale_rows).flatten(-2).mul_(weight))
        ctx.save_for_backward(y, z, weight, scale)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, z, gain, scale = ctx.saved_tensors
        wide, groups = scale.dtype, scale.shape[-2]
        grad_y, grad_z = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (y, z))
        weight = gain.to(wide)
        grad_weight = torch.zeros_like(weight)
        for y_rows, z_rows, scale_rows, grad_rows, grad_y_rows, grad_z_rows in row_blocks(
            _rows(y), _rows(z), scale.flatten(0, -3), _rows(grad), _rows(grad_y), _rows(grad_z)
        ):
            y_wide, z_wide = y_rows.to(wide), z_rows.to(wide)
            sigmoid = z_wide.sigmoid()
            silu = z_wide.mul(sigmoid)
            unit = (silu * y_wide).unflatten(-1, (groups, -1)).mul_(scale_rows)
            inner = grad_rows * weight  # [rows, D]
            grad_weight += (unit.flatten(-2) * grad_rows).sum(0)
            inner = inner.unflatten(-1, (groups, -1))
            shared = (unit * inner).mean(-1, keepdim=True)
            inner = inner.addcmul_(unit, shared, value=-1).mul_(scale_rows).flatten(-2)
            grad_y_rows.copy_(inner * silu)
            # d silu / dz = sigmoid + silu (1 - sigmoid)
            slope = (1 - sigmoid).mul_(silu).add_(sigmoid)
            grad_z_rows.copy_(inner.mul_(y_wide).mul_(slope))
        return grad_y, grad_z, grad_weight.to(gain.dtype), None, None


def _rows(x: Float[Tensor, "*batch D"]) -> Float[Tensor, "M D"]:
    return x.reshape(-1, x.shape[-1])


def gated_rms_norm(
    y: Float[Tensor, "*batch D"],
    z: Float[Tensor, "*batch D"],
    weight: Float[Tensor, " D"],
    groups: int,
    eps: float,
) -> Float[Tensor, "*batch D"]:
    """The reference's formula, with a hand-written gradient."""
    if y.numel() <= BLOCK_ELEMENTS and not torch.is_grad_enabled():
        wide = torch.promote_types(y.dtype, torch.float32)
        gated = F.silu(z.to(wide)).mul_(y).unflatten(-1, (groups, -1))
        return gated.mul_(inverse_rms(gated, eps)).flatten(-2).mul_(weight).to(y.dtype)
    return _GatedRMSNorm.apply(y, z, weight, groups, eps)


backend = Backend("fused", gated_rms_norm)
