"""Compile all kernels for this CPU, so that no run has to: python -m nemotron.ops.prepare."""

import torch

from nemotron.ops.attention import numba as attention
from nemotron.ops.causal_conv1d import numba as causal_conv1d
from nemotron.ops.grouped_linear import numba as grouped_linear
from nemotron.ops.grouped_mlp import numba as grouped_mlp
from nemotron.ops.jit.call import kernels
from nemotron.ops.linear_cross_entropy import numba as linear_cross_entropy
from nemotron.ops.rms_norm import numba as rms_norm
from nemotron.ops.squared_relu import numba as squared_relu
from nemotron.ops.ssd import numba as ssd
from nemotron.ops.token_step import compiled

OPERATIONS = (
    attention,
    causal_conv1d,
    grouped_linear,
    grouped_mlp,
    linear_cross_entropy,
    rms_norm,
    squared_relu,
    ssd,
)


def prepare() -> None:
    """Compile what is not kept yet, for float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        compiled.kernels(dtype)
        for operation in OPERATIONS:
            kernels(operation.MODULE, dtype)


if __name__ == "__main__":
    prepare()
