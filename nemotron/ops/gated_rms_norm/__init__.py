"""The gated, grouped normalisation of the Mamba-2 mixer."""

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.ops.gated_rms_norm import fused, reference
from nemotron.ops.registry import Backend, Operation, lazy

operation = Operation(
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
        reference.backend,
    ],
)


def gated_rms_norm(
    y: Float[Tensor, "*batch D"],
    z: Float[Tensor, "*batch D"],
    weight: Float[Tensor, " D"],
    groups: int,
    eps: float = 1e-5,
) -> Float[Tensor, "*batch D"]:
    """Multiply by silu(z), then normalise each of `groups` blocks of channels by itself.

    The gate comes before the norm; all is computed in float32, the result has the dtype of `y`.
    Source: state-spaces/mamba: mamba_ssm/ops/triton/layernorm_gated.py (norm_before_gate=False).
    """
    return operation.select(y)(y, z, weight, groups, eps)
