"""Gate and grouped norm that keep only their inputs and one number a group for backward."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.ops.registry import Backend


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
        wide = torch.promote_types(y.dtype, torch.float32)
        gated = torch.nn.functional.silu(z.to(wide)).mul_(y)
        gated = gated.unflatten(-1, (groups, -1))
        scale = gated.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(y, z, weight, scale)
        return gated.mul_(scale).flatten(-2).mul_(weight).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight, scale = ctx.saved_tensors
        wide, groups = scale.dtype, scale.shape[-2]
        y_wide, z_wide, grad = y.to(wide), z.to(wide), grad.to(wide)
        sigmoid = z_wide.sigmoid()
        silu = z_wide * sigmoid
        unit = (silu * y_wide).unflatten(-1, (groups, -1)).mul_(scale)  # [..., groups, D / groups]
        product = unit * grad.unflatten(-1, (groups, -1))
        grad_weight = product.flatten(-2).flatten(0, -2).sum(0)
        product *= weight.view(groups, -1)
        shared = product.mean(-1, keepdim=True)
        inner = (grad * weight).unflatten(-1, (groups, -1))
        inner = inner.addcmul_(unit, shared, value=-1).mul_(scale).flatten(-2)
        grad_y = (inner * silu).to(y.dtype)
        # d silu / dz = sigmoid + silu (1 - sigmoid)
        slope = sigmoid.addcmul_(silu, 1 - sigmoid)
        grad_z = inner.mul_(y_wide).mul_(slope).to(z.dtype)
        return grad_y, grad_z, grad_weight.to(weight.dtype), None, None


def gated_rms_norm(
    y: Float[Tensor, "*batch D"],
    z: Float[Tensor, "*batch D"],
    weight: Float[Tensor, " D"],
    groups: int,
    eps: float,
) -> Float[Tensor, "*batch D"]:
    """The reference's formula, with a hand-written gradient."""
    return _GatedRMSNorm.apply(y, z, weight, groups, eps)


backend = Backend("fused", gated_rms_norm)
