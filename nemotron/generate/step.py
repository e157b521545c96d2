"""Layers in the form in which one token passes them with the fewest operations."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nemotron.model.attention import Attention
from nemotron.model.cache import AttentionState, MambaState
from nemotron.model.config import ModelConfig
from nemotron.model.linear import Linear
from nemotron.model.mamba2 import Mamba2
from nemotron.ops.gated_rms_norm import gated_rms_norm


class MambaStep(Mamba2):
    """Mixes one token of each row by the recurrence itself, several as in training."""

    def __init__(self, mamba: Mamba2, config: ModelConfig) -> None:
        with torch.device("meta"):
            super().__init__(config)
        self.load_state_dict(mamba.state_dict(), assign=True)
        self.taps = self.conv1d.weight.squeeze(1).T.contiguous()  # [W, C]
        self.decay = -self.A_log.exp().view(-1, 1, 1)
        self.skip, self.gain = self.D.view(-1, 1, 1), self.norm.weight

    def forward(
        self,
        u: Float[Tensor, "B T D"],
        seq_idx: Int[Tensor, "B T"] | None = None,
        state: MambaState | None = None,
    ) -> Float[Tensor, "B T D"]:
        """As `Mamba2.forward`; `state` changes in place."""
        if state is None or seq_idx is not None or u.shape[1] != 1:
            return super().forward(u, seq_idx, state)
        z, xBC, dt = self.in_proj(u).split(self.splits, dim=-1)
        window = torch.cat([state.conv, xBC], dim=1)  # [B, W, C]
        state.conv = window[:, 1:]
        mixed = (window * self.taps).sum(1)
        if self.conv1d.bias is not None:
            mixed += self.conv1d.bias
        inner, bc = self.splits[0], self.num_groups * self.state_size
        x, B, C = F.silu(mixed, inplace=True).split([inner, bc, bc], dim=-1)
        x = x.view(*state.ssm.shape[:3], 1)  # [B, H, P, 1]
        dt = self._time_step(dt).view(*state.ssm.shape[:2], 1, 1)

        # S <- exp(dt A) S + dt x ⊗ B, then y = S C + D x
        state.ssm.mul_((dt * self.decay).exp_())
        # every group by itself, the channels of its heads side by side: [B G, H P / G, N]
        states = state.ssm.view(-1, inner // self.num_groups, self.state_size)
        B, C = (t.reshape(-1, 1, self.state_size) for t in (B, C))
        states.addcmul_((dt * x).view(states.shape[0], -1, 1), B)
        y = torch.bmm(C, states.mT).view_as(x).addcmul_(x, self.skip)
        y = y.view_as(z).to(u.dtype)
        return self.out_proj(gated_rms_norm(y, z, self.gain, self.num_groups, self.norm.eps))


class JointAttention(Attention):
    """Computes queries, keys and values in one product."""

    def __init__(self, attention: Attention, config: ModelConfig) -> None:
        with torch.device("meta"):
            super().__init__(config)
        self.load_state_dict(attention.state_dict(), assign=True)
        parts: list[Tensor] = [part.weight for part in (self.q_proj, self.k_proj, self.v_proj)]
        self.sizes = [part.shape[0] for part in parts]
        self.qkv_proj = Linear(parts[0].shape[1], sum(self.sizes))
        self.qkv_proj.weight = nn.Parameter(torch.cat(parts))
        del self.q_proj, self.k_proj, self.v_proj

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        seq_idx: Int[Tensor, "B T"] | None = None,
        state: AttentionState | None = None,
        start: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """As `Attention.forward`."""
        q, k, v = self.qkv_proj(x).split(self.sizes, dim=-1)
        return self.o_proj(self.attend(q, k, v, seq_idx, state, start))
