"""The CUDA kernel of the package causal-conv1d."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.registry import Backend


def causal_conv1d(
    x: Float[Tensor, "B T C"],
    weight: Float[Tensor, "C W"],
    bias: Float[Tensor, " C"] | None,
    initial_state: Float[Tensor, "B W1 C"] | None,
    seq_idx: Int[Tensor, "B T"] | None,
    activation: bool,
) -> Float[Tensor, "B T C"]:
    """Convolve in one kernel; seen as [B, C, T], our memory order is its "channel last"."""
    from causal_conv1d import causal_conv1d_fn

    y = causal_conv1d_fn(
        x.transpose(1, 2),
        weight,
        bias,
        seq_idx=seq_idx,
        initial_states=None if initial_state is None else initial_state.transpose(1, 2),
        activation="silu" if activation else None,
    )
    return y.transpose(1, 2)


backend = Backend(
    "causal_conv1d",
    causal_conv1d,
    devices=frozenset({"cuda"}),
    dtypes=frozenset({torch.float32, torch.bfloat16}),
    # not both in one call, and no channel counts or strides that 8 does not divide
    features=frozenset({"documents", "initial_state"}),
    packages=("causal_conv1d",),
    install="pip install 'causal-conv1d>=1.6' --no-build-isolation",
    imports=("causal_conv1d",),
)
