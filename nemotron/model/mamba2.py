"""The Mamba-2 mixer (Dao & Gu 2024, "Transformers are SSMs"), as Megatron-LM trains it."""

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nemotron.model import few_tokens
from nemotron.model.config import ModelConfig
from nemotron.model.linear import Linear, RMSNorm
from nemotron.model.state import MambaState
from nemotron.ops.causal_conv1d import causal_conv1d
from nemotron.ops.mamba_step import mamba_step
from nemotron.ops.rms_norm import gated_rms_norm
from nemotron.ops.ssd import ssd


class CausalConv(nn.Module):
    """Holds the weights of the depthwise convolution; the operation itself is in `ops`."""

    def __init__(self, channels: int, kernel: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None


class ConvAndScan(Protocol):
    """What of a Mamba-2 mixer crosses tokens; `parallel` puts another where ranks share a row."""

    def __call__(
        self,
        mixer: "Mamba2",
        xBC: Float[Tensor, "B T C"],
        dt: Float[Tensor, "B T H"],
        seq_idx: Int[Tensor, "B T"] | None,
        state: MambaState | None,
    ) -> Float[Tensor, "B T I"]:
        """Convolve and scan, with weights and operations of `mixer`."""


class Mamba2(nn.Module):
    """Selective state-space mixer with scalar decay per head and a grouped gated norm."""

    conv_and_scan: ConvAndScan

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.mamba_num_heads, config.mamba_head_dim
        self.num_groups, self.state_size = config.n_groups, config.ssm_state_size
        self.time_step_limit = config.time_step_limit
        inner, channels = config.mamba_inner_size, config.conv_channels
        # in_proj -> [z, x, B, C, dt]
        self.splits = [inner, channels, self.num_heads]
        self.in_proj = Linear(config.hidden_size, sum(self.splits))
        self.conv1d = CausalConv(channels, config.conv_kernel, config.use_conv_bias)
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.norm = RMSNorm(inner, eps=config.layer_norm_epsilon)
        self.out_proj = Linear(inner, config.hidden_size)
        self.causal_conv1d, self.ssd, self.gated_rms_norm = causal_conv1d, ssd, gated_rms_norm
        self.mamba_step = mamba_step
        self.conv_and_scan = conv_and_scan

    def forward(
        self,
        u: Float[Tensor, "B T D"],
        seq_idx: Int[Tensor, "B T"] | None = None,
        state: MambaState | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the tokens; a given `state` is continued and brought up to date in place."""
        z, xBC, dt = _Split.apply(self.in_proj(u), self.splits)
        dt = self._time_step(dt)
        if state is not None and state.keeps_inputs:
            y = self._mix_few(xBC, dt, state)
        elif state is None or state.history is None:
            y = self.conv_and_scan(self, xBC, dt, seq_idx, state)
        else:  # the state after every token is asked for
            each = zip(xBC.split(1, dim=1), dt.split(1, dim=1), strict=True)
            y = torch.cat([self.conv_and_scan(self, *one, None, state) for one in each], dim=1)
        y = self.gated_rms_norm(y, z, self.norm.weight, self.num_groups, self.norm.eps)
        return self.out_proj(y)

    def _mix_few(
        self, xBC: Float[Tensor, "B T C"], dt: Float[Tensor, "B T H"], state: MambaState
    ) -> Float[Tensor, "B T I"]:
        """Convolve and scan; the state stays, and keeps what would change it."""
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        mixed = self.causal_conv1d(xBC, weight, bias, initial_state=state.conv, seq_idx=None)
        x, B, C = self.split(mixed)
        window, decay = torch.cat([state.conv, xBC], dim=1), dt * -self.A_log.exp()
        state.inputs = few_tokens.Inputs(window, x, dt, decay, B)
        return few_tokens.scan(state.inputs, C, self.D, state.ssm).flatten(2)

    def split(
        self, xBC: Float[Tensor, "B T C"]
    ) -> tuple[Float[Tensor, "B T H P"], Float[Tensor, "B T G N"], Float[Tensor, "B T G N"]]:
        """Cut the channels of the convolution into heads of x and groups of B and C."""
        inner, bc = self.splits[0], self.num_groups * self.state_size
        x, B, C = _Split.apply(xBC, [inner, bc, bc])
        groups = (self.num_groups, self.state_size)
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        return x, B.unflatten(-1, groups), C.unflatten(-1, groups)

    def _time_step(self, dt: Float[Tensor, "*batch H"]) -> Float[Tensor, "*batch H"]:
        """Return the step size, in float32 as the CUDA kernels do: exp() amplifies rounding."""
        dt = F.softplus(dt.to(self.dt_bias.dtype) + self.dt_bias)
        return dt if self.time_step_limit == (0.0, math.inf) else dt.clamp(*self.time_step_limit)


def conv_and_scan(
    mixer: Mamba2,
    xBC: Float[Tensor, "B T C"],
    dt: Float[Tensor, "B T H"],
    seq_idx: Int[Tensor, "B T"] | None,
    state: MambaState | None,
) -> Float[Tensor, "B T I"]:
    """Convolve and scan whole rows; a given `state` is continued and brought up to date."""
    mixed = mixer.causal_conv1d(
        xBC,
        mixer.conv1d.weight.squeeze(1),
        mixer.conv1d.bias,
        initial_state=state.conv if state is not None else None,
        seq_idx=seq_idx,
    )
    x, B, C = mixer.split(mixed)
    y = mixer.ssd(
        x,
        dt,
        -mixer.A_log.exp(),
        B,
        C,
        mixer.D,
        initial_state=state.ssm if state is not None else None,
        seq_idx=seq_idx,
        return_final_state=state is not None,
    )
    if isinstance(y, tuple):
        assert state is not None
        y, final_state = y
        state.store(_last_inputs(state.conv, xBC), final_state)
    return y.flatten(2)


class _Split(torch.autograd.Function):
    """Cut the channels; backward writes each part in its place with all cores, torch's with one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        ctx.sizes = sizes
        return x.split(sizes, dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        whole = grads[0].new_empty(*grads[0].shape[:-1], sum(ctx.sizes))
        for part, grad in zip(whole.split(ctx.sizes, dim=-1), grads, strict=True):
            part.copy_(grad)
        return whole, None


def _last_inputs(
    previous: Float[Tensor, "B W C"], inputs: Float[Tensor, "B T C"]
) -> Float[Tensor, "B W C"]:
    """Return the newest W convolution inputs."""
    return torch.cat([previous, inputs], dim=1)[:, -previous.shape[1] :]
