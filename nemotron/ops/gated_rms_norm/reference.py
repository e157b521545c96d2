"""Gate, then normalise each group of channels, as it is defined."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nemotron.ops.registry import Backend


def gated_rms_norm(
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


backend = Backend("reference", gated_rms_norm)
