"""Causal depthwise convolution, tap by tap."""

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
    """Sum the taps in float32 or wider; a tap from another document counts as zero."""
    wide = torch.promote_types(x.dtype, torch.float32)
    taps, length = weight.shape[1], x.shape[1]
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], taps - 1, x.shape[2])
    inputs = torch.cat([initial_state, x], dim=1).to(wide)
    y = torch.zeros_like(x, dtype=wide)
    for tap in range(taps):
        term = inputs[:, tap : tap + length] * weight[:, tap].to(wide)
        if seq_idx is not None:
            ids = F.pad(seq_idx, (taps - 1, 0))  # what came before x belongs to document 0
            term = term * (ids[:, tap : tap + length] == seq_idx).unsqueeze(-1)
        y = y + term
    if bias is not None:
        y = y + bias.to(wide)
    return (F.silu(y) if activation else y).to(x.dtype)


backend = Backend(
    "reference",
    causal_conv1d,
    features=frozenset({"documents", "initial_state", "documents_after_a_state", "any_width"}),
)
