"""Root-mean-square normalization, plain and as the Mamba-2 mixer's gated and grouped one."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nemotron.ops.registry import Backend, Operation, lazy
from nemotron.ops.rms_norm import fused


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


rms_norm = RMSNormOp(
    "rms_norm",
    [
        Backend(
            "triton",
            lazy("nemotron.ops.rms_norm.triton", "rms_norm"),
            devices=frozenset({"cuda"}),
            dtypes=frozenset({torch.float32, torch.bfloat16}),
            packages=("triton",),
            install="comes with torch for CUDA",
            imports=("nemotron.ops.rms_norm.triton",),
        ),
        Backend(
            "numba",
            lazy("nemotron.ops.rms_norm.numba", "rms_norm"),
            devices=frozenset({"cpu"}),
            dtypes=frozenset({torch.float32, torch.bfloat16}),
            packages=("numba",),
            install="pip install numba",
            imports=("nemotron.ops.jit.vectors",),
            by_name=True,
        ),
        fused.backend,
        Backend("reference", reference),
    ],
)

gated_rms_norm = GatedRMSNormOp(
    "gated_rms_norm",
    [
        Backend(
            "triton",
            lazy("nemotron.ops.rms_norm.gated_triton", "gated_rms_norm"),
            devices=frozenset({"cuda"}),
            dtypes=frozenset({torch.float32, torch.bfloat16}),
            packages=("triton",),
            install="comes with torch for CUDA",
            imports=("nemotron.ops.rms_norm.gated_triton",),
        ),
        Backend(
            "numba",
            lazy("nemotron.ops.rms_norm.numba", "gated_rms_norm"),
            devices=frozenset({"cpu"}),
            dtypes=frozenset({torch.float32, torch.bfloat16}),
            packages=("numba",),
            install="pip install numba",
            imports=("nemotron.ops.jit.vectors",),
            by_name=True,
        ),
        fused.gated_backend,
        Backend("reference", gated_reference),
    ],
)
