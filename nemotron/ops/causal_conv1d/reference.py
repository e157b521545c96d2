"""Causal depthwise convolution as a sum over the kernel: the definition."""

import torch
import torch.nn.functional as F
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
    """Sum W products in float32 or wider; an input of another document counts as zero."""
    wide = torch.promote_types(x.dtype, torch.float32)
    width, length = weight.shape[1], x.shape[1]
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    inputs = torch.cat([initial_state, x], dim=1).to(wide)
    y = torch.zeros_like(x, dtype=wide)
    for offset in range(width):
        term = inputs[:, offset : offset + length] * weight[:, offset].to(wide)
        if seq_idx is not None:
            ids = F.pad(seq_idx, (width - 1, 0))  # what came before x belongs to document 0
            term = term * (ids[:, offset : offset + length] == seq_idx).unsqueeze(-1)
        y = y + term
    if bias is not None:
        y = y + bias.to(wide)
    return (F.silu(y) if activation else y).to(x.dtype)


backend = Backend(
    "reference",
    causal_conv1d,
    features=frozenset({"documents", "initial_state", "documents_after_a_state", "any_width"}),
)
