"""The gated, grouped normalisation of the Mamba-2 mixer."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nemotron.ops.gated_rms_norm import fused
from nemotron.ops.registry import Backend, Operation, lazy


class GatedRMSNormOp(Operation):
    """Multiply by silu(z), then normalise each of `groups` blocks of channels by itself.

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


def reference(
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


gated_rms_norm = GatedRMSNormOp(
    "gated_rms_norm",
    [
        Backend(
            "triton",
            lazy("nemotron.ops.gated_rms_norm.triton", "gated_rms_norm"),
            devices=frozenset({"cuda"}),
            dtypes=frozenset({torch.float32, torch.bfloat16}),
            packages=("triton",),
            install="comes with torch for CUDA",
            imports=("nemotron.ops.gated_rms_norm.triton",),
        ),
        fused.backend,
        Backend("reference", reference),
    ],
)
