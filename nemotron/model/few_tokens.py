"""The scan over a few tokens whose state is not changed until it is known how many are kept.

What was drafted is read as one call, and then some of it is forgotten. A Mamba-2 state cannot run
backwards, so the call leaves it as it was and keeps its inputs, which are small beside the state.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """What a call would change a state by, for any number of its first tokens.

    Source: NVIDIA/TensorRT-LLM PR 13453 (replay of the inputs instead of stored states).
    """

    window: Float[Tensor, "B S C"]
    """Inputs of the convolution: the W-1 before the call, then those of its T tokens."""
    x: Float[Tensor, "B T H P"]
    dt: Float[Tensor, "B T H"]
    decay: Float[Tensor, "B T H"]
    """dt A, which is negative."""
    B: Float[Tensor, "B T G N"]

    def conv(self, counts: Int[Tensor, " B"]) -> Float[Tensor, "B W C"]:
        """Return the last W-1 inputs of the convolution after `counts` tokens of each row."""
        width = self.window.shape[1] - self.x.shape[1]
        places = counts[:, None] + torch.arange(width, device=counts.device)
        return self.window.gather(1, places[..., None].expand(-1, -1, self.window.shape[2]))

    def advance(self, ssm: Float[Tensor, "B H P N"], counts: Int[Tensor, " B"]) -> None:
        """Bring a state, in place, to that after `counts` tokens of each row."""
        groups = self.B.shape[2]
        is_kept = torch.arange(self.x.shape[1], device=counts.device) < counts[:, None]
        decay = self.decay * is_kept[..., None]
        passed = decay.cumsum(1)  # [B, T, H]
        whole = passed[:, -1:]
        weights = (whole - passed).exp() * self.dt * is_kept[..., None]
        ssm.mul_(whole.exp().view(*ssm.shape[:2], 1, 1))
        # every group by itself, the channels of its heads side by side: [B G, H P / G, T]
        x = (self.x.to(ssm.dtype) * weights[..., None]).unflatten(2, (groups, -1))
        x = x.permute(0, 2, 3, 4, 1).flatten(0, 1).flatten(1, 2)
        B = self.B.to(ssm.dtype).transpose(1, 2).flatten(0, 1)  # [B G, T, N]
        ssm.view(x.shape[0], x.shape[1], -1).baddbmm_(x, B)


def scan(
    inputs: Inputs,
    C: Float[Tensor, "B T G N"],
    D: Float[Tensor, " H"],
    ssm: Float[Tensor, "B H P N"],
) -> Float[Tensor, "B T H P"]:
    """Return what `SSDOp` returns, and leave the state unchanged.

    y_t = exp(s_t) S C_t + sum over r <= t of exp(s_t - s_r) dt_r (B_r C_t) x_r + D x_t, where s
    sums up dt A: the dual form in one chunk (Dao & Gu 2024, section 6).
    """
    groups, size = C.shape[2], ssm.shape[3]
    x, B = inputs.x.to(ssm.dtype), inputs.B.to(ssm.dtype)
    C = C.to(ssm.dtype).transpose(1, 2)  # [B, G, T, N]
    passed = inputs.decay.cumsum(1).transpose(1, 2)  # [B, H, T]
    between = passed.unsqueeze(-1) - passed.unsqueeze(-2)
    later = torch.ones(between.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
    shares = between.masked_fill(later, float("-inf")).exp() * inputs.dt.mT.unsqueeze(-2)
    alike = C @ B.permute(0, 2, 3, 1)  # [B, G, T, T]
    shares = shares.unflatten(1, (groups, -1)) * alike.unsqueeze(2)
    y = shares.flatten(1, 2) @ x.transpose(1, 2)  # [B, H, T, P]
    states = ssm.reshape(ssm.shape[0], groups, -1, size)
    before = (C @ states.mT).unflatten(-1, (-1, ssm.shape[2]))  # [B, G, T, H / G, P]
    before = before.transpose(2, 3).flatten(1, 2)
    y = y.addcmul_(before, passed.exp().unsqueeze(-1)).transpose(1, 2)
    return (y + D[:, None] * x).to(inputs.x.dtype)
