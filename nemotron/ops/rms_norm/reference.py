"""Root-mean-square normalisation, as it is defined."""

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.ops.registry import Backend


def rms_norm(
    x: Float[Tensor, "*batch D"], weight: Float[Tensor, " D"], eps: float
) -> Float[Tensor, "*batch D"]:
    """x / sqrt(mean(x²) + eps) * weight, in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (unit * weight).to(x.dtype)


backend = Backend("reference", rms_norm)
