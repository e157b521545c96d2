"""Root-mean-square normalization, plain and as the Mamba-2 mixer's gated and grouped one."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nemotron.device import CACHED_ELEMENTS, row_blocks
from nemotron.ops.registry import Backend, Operation, numba_backend, triton_backend


class RMSNormOp(Operation):
    """Scale each vector to unit root mean square, then by `weight`.

    The mean and the product are taken in float32; the result has the dtype of `x`.
    Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization".
    """

    def __call__(
        self, x: Float[Tensor, "*batch D"], weight: Float[Tensor, " D"], eps: float = 1e-5
    ) -> Float[Tensor, "*batch D"]:
        return self.select(x)(x, weight, eps)


def reference(
    x: Float[Tensor, "*batch D"], weight: Float[Tensor, " D"], eps: float
) -> Float[Tensor, "*batch D"]:
    """x / sqrt(mean(x²) + eps) * weight, in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (unit * weight).to(x.dtype)


class GatedRMSNormOp(Operation):
    """Multiply by silu(z), then normalize each of `groups` blocks of channels by itself.

    The gate comes before the norm; all is computed in float32, the result has the dtype of `y`.
    Source: state-spaces/mamba: mamba_ssm/ops/triton/layernorm_gated.py (norm_before_gate=False).
    """

    def __call__(
        self,
        y: Float[Tensor, "*batch D"],
        z: Float[Tensor, "*batch D"],
        weight: Float[Tensor, " D"],
        groups: int,
        eps: float = 1e-5,
    ) -> Float[Tensor, "*batch D"]:
        return self.select(y)(y, z, weight, groups, eps)


def gated_reference(
    y: Float[Tensor, "*batch D"],
    z: Float[Tensor, "*batch D"],
    weight: Float[Tensor, " D"],
    groups: int,
    eps: float,
) -> Float[Tensor, "*batch D"]:
    """GroupRMSNorm(y * silu(z)) * weight, in float32 or wider."""
    wide = torch.promote_types(y.dtype, torch.float32)
    gated = (y.to(wide) * F.silu(z.to(wide))).unflatten(-1, (groups, -1))
    unit = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)
    return (unit.flatten(-2) * weight).to(y.dtype)


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


def inverse_rms(x: Float[Tensor, "*batch D"], eps: float) -> Float[Tensor, "*batch 1"]:
    """Return 1 / sqrt(mean(x²) + eps) in float32 or wider, in few operations."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, 2, -1, True, dtype=wide)
    return norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()


def fused(
    x: Float[Tensor, "*batch D"], weight: Float[Tensor, " D"], eps: float
) -> Float[Tensor, "*batch D"]:
    """The reference's formula, with a hand-written gradient."""
    if x.numel() <= CACHED_ELEMENTS and not torch.is_grad_enabled():
        return (x * weight).mul_(inverse_rms(x, eps)).to(x.dtype)
    return _RMSNorm.apply(x, weight, eps)


def gated_fused(
    y: Float[Tensor, "*batch D"],
    z: Float[Tensor, "*batch D"],
    weight: Float[Tensor, " D"],
    groups: int,
    eps: float,
) -> Float[Tensor, "*batch D"]:
    """The reference's formula, with a hand-written gradient."""
    if y.numel() <= CACHED_ELEMENTS and not torch.is_grad_enabled():
        wide = torch.promote_types(y.dtype, torch.float32)
        gated = F.silu(z.to(wide)).mul_(y).unflatten(-1, (groups, -1))
        return gated.mul_(inverse_rms(gated, eps)).flatten(-2).mul_(weight).to(y.dtype)
    return _GatedRMSNorm.apply(y, z, weight, groups, eps)


rms_norm = RMSNormOp(
    "rms_norm",
    [
        triton_backend(
            "nemotron.ops.rms_norm.triton",
            "rms_norm",
        ),
        numba_backend("nemotron.ops.rms_norm.numba", "rms_norm"),
        Backend("fused", fused),
        Backend("reference", reference),
    ],
)


class ResidualRMSNormOp(Operation):
    """Return `x`, which goes on beside a mixer, and its norm, which goes into the mixer.

    For blocks that would else call the norm alone: the gradients that come back on both ways are
    added in float32 and rounded once, where autograd would add what the norm's was rounded to.
    """

    def __call__(
        self, x: Float[Tensor, "*batch D"], weight: Float[Tensor, " D"], eps: float = 1e-5
    ) -> tuple[Float[Tensor, "*batch D"], Float[Tensor, "*batch D"]]:
        return self.select(x)(x, weight, eps)


def beside(
    x: Float[Tensor, "*batch D"], weight: Float[Tensor, " D"], eps: float
) -> tuple[Float[Tensor, "*batch D"], Float[Tensor, "*batch D"]]:
    """Return `x` and its norm by the first choice for norms."""
    return x, rms_norm(x, weight, eps)


residual_rms_norm = ResidualRMSNormOp(
    "residual_rms_norm",
    [
        triton_backend(
            "nemotron.ops.rms_norm.triton",
            "residual_rms_norm",
            by_name=True,  # has not run on a GPU yet
        ),
        Backend("reference", beside),
    ],
)

gated_rms_norm = GatedRMSNormOp(
    "gated_rms_norm",
    [
        triton_backend(
            "nemotron.ops.rms_norm.gated_triton",
            "gated_rms_norm",
        ),
        numba_backend("nemotron.ops.rms_norm.numba", "gated_rms_norm"),
        Backend("fused", gated_fused),
        Backend("reference", gated_reference),
    ],
)
