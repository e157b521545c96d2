"""Mamba-2 and attention layers that start fewer operations for one token."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.generate.module_copies import frozen, take_over
from nemotron.model.attention import Attention
from nemotron.model.linear import Linear
from nemotron.model.mamba2 import Mamba2
from nemotron.model.state import AttentionState, MambaState
from nemotron.ops.mamba_step import Weights


class MambaStep(Mamba2):
    """Mixes tokens of a cached row one by one by the recurrence itself, others as in training.

    With `copies` the layer computes with its parameters of now, else with those of each call.
    """

    def __init__(self, mamba: Mamba2, *, copies: bool = False) -> None:
        take_over(self, mamba)
        self._constants = self._find_constants() if copies else None

    def forward(
        self,
        u: Float[Tensor, "B T D"],
        seq_idx: Int[Tensor, "B T"] | None = None,
        state: MambaState | None = None,
    ) -> Float[Tensor, "B T D"]:
        """As `Mamba2.forward`; the states change in place."""
        is_stepwise = state is not None and (u.shape[1] == 1 or state.history is not None)
        if state is None or state.keeps_inputs or not is_stepwise:
            return super().forward(u, seq_idx, state)
        z, xBC, dt = self.in_proj(u).split(self.splits, dim=-1)
        if u.shape[1] == 1 and (y := self._fused_step(xBC, dt, state)) is not None:
            y = self.gated_rms_norm(y, z, self.norm.weight, self.num_groups, self.norm.eps)
            return self.out_proj(y)
        dt = self._time_step(dt)
        constants = self._constants or self._find_constants()
        if u.shape[1] == 1:
            y = self._step(xBC, dt, state, constants)
        else:
            each = zip(xBC.split(1, dim=1), dt.split(1, dim=1), strict=True)
            y = torch.cat([self._step(*one, state, constants) for one in each], dim=1)
        y = self.gated_rms_norm(y.to(u.dtype), z, self.norm.weight, self.num_groups, self.norm.eps)
        return self.out_proj(y)

    def _fused_step(
        self, xBC: Float[Tensor, "B 1 C"], dt: Float[Tensor, "B 1 H"], state: MambaState
    ) -> Float[Tensor, "B 1 I"] | None:
        """Do what lies between the projection and the norm in one operation, where there is one."""
        if (places := state.in_place()) is None or not self.mamba_step.takes(xBC):
            return None
        weights = Weights(
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.dt_bias,
            self.A_log,
            self.D,
            self.time_step_limit,
        )
        return self.mamba_step(xBC.squeeze(1), dt.squeeze(1), *places, weights).unsqueeze(1)

    def _find_constants(self) -> "_Constants":
        kernel, decay = self.conv1d.weight.squeeze(1).T, -self.A_log.exp()
        skip = self.D.view(-1, 1, 1).clone()
        return _Constants(kernel.contiguous(), decay.view(-1, 1, 1), skip)

    def _step(
        self,
        xBC: Float[Tensor, "B 1 C"],
        dt: Float[Tensor, "B 1 H"],
        state: MambaState,
        constants: "_Constants",
    ) -> Float[Tensor, "B 1 I"]:
        """Convolve and scan one token of each row."""
        window = torch.cat([state.conv, xBC], dim=1)  # [B, W, C]
        mixed = (window * constants.kernel).sum(1)
        if self.conv1d.bias is not None:
            mixed += self.conv1d.bias
        inner, bc = self.splits[0], self.num_groups * self.state_size
        x, B, C = F.silu(mixed, inplace=True).split([inner, bc, bc], dim=-1)
        ssm = state.ssm
        x = x.view(*ssm.shape[:3], 1)  # [B, H, P, 1]
        dt = dt.view(*ssm.shape[:2], 1, 1)

        # S <- exp(dt A) S + dt x ⊗ B, then y = S C + D x
        ssm.mul_((dt * constants.decay).exp_())
        # every group by itself, the channels of its heads side by side: [B G, H P / G, N]
        states = ssm.view(-1, inner // self.num_groups, self.state_size)
        B, C = (t.reshape(-1, 1, self.state_size) for t in (B, C))
        states.addcmul_((dt * x).view(states.shape[0], -1, 1), B)
        y = torch.bmm(C, states.mT).view_as(x).addcmul_(x, constants.skip)
        state.store(window[:, 1:], ssm)
        return y.view(xBC.shape[0], 1, inner)


class _Constants(NamedTuple):
    """What a step of the recurrence needs besides its inputs."""

    kernel: Float[Tensor, "W C"]
    decay: Float[Tensor, "H 1 1"]
    """-exp(A_log)"""
    skip: Float[Tensor, "H 1 1"]


class JointAttention(Attention):
    """Computes queries, keys and values in one product."""

    def __init__(self, attention: Attention) -> None:
        take_over(self, attention)
        parts: list[Tensor] = [part.weight for part in (self.q_proj, self.k_proj, self.v_proj)]
        self.sizes = [part.shape[0] for part in parts]
        with torch.device("meta"):
            self.qkv_proj = Linear(parts[0].shape[1], sum(self.sizes))
        self.qkv_proj.linear = self.q_proj.linear
        self.qkv_proj.weight = frozen(torch.cat(parts))
        del self.q_proj, self.k_proj, self.v_proj

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        seq_idx: Int[Tensor, "B T"] | None = None,
        state: AttentionState | None = None,
    ) -> Float[Tensor, "B T D"]:
        """As `Attention.forward`."""
        q, k, v = self.qkv_proj(x).split(self.sizes, dim=-1)
        return self.o_proj(self.attend(q, k, v, seq_idx, state))
