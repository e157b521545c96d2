"""Root-mean-square normalisation."""

import torch
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
        fused.backend,
        Backend("reference", reference),
    ],
)
