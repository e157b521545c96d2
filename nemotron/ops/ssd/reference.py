"""The selective state-space recurrence, one token at a time."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.registry import Backend


def ssd(
    x: Float[Tensor, "B T H P"],
    dt: Float[Tensor, "B T H"],
    A: Float[Tensor, " H"],
    B: Float[Tensor, "B T G N"],
    C: Float[Tensor, "B T G N"],
    D: Float[Tensor, " H"],
    initial_state: Float[Tensor, "B H P N"] | None,
    seq_idx: Int[Tensor, "B T"] | None,
) -> tuple[Float[Tensor, "B T H P"], Float[Tensor, "B H P N"]]:
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t ⊗ B_t; y_t = S_t C_t + D x_t (Dao & Gu 2024, eq. 1)."""
    repeat = x.shape[2] // B.shape[2]
    wide_x = x.to(dt.dtype)
    B, C = (t.to(dt.dtype).repeat_interleave(repeat, dim=2) for t in (B, C))
    state = initial_state
    if state is None:
        state = dt.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3])
    document = torch.zeros(x.shape[0], dtype=torch.int32, device=x.device)
    outputs = []
    for t in range(x.shape[1]):
        if seq_idx is not None:
            same = torch.eq(seq_idx[:, t], document)
            state = state * same[:, None, None, None]
            document = seq_idx[:, t]
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        update = (dt[:, t, :, None] * wide_x[:, t])[..., None] * B[:, t, :, None]
        state = decay * state + update
        outputs.append((state * C[:, t, :, None]).sum(-1) + D[:, None] * wide_x[:, t])
    return torch.stack(outputs, dim=1).to(x.dtype), state


backend = Backend(
    "reference",
    ssd,
    features=frozenset({"documents", "initial_state", "final_state"}),
)
