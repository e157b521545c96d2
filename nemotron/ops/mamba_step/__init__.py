"""One token of a Mamba-2 layer for each of several texts: convolution, time step, recurrence."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.registry import Backend, Operation, triton_backend


class Weights(NamedTuple):
    """What a layer knows between its two projections."""

    conv: Float[Tensor, "C W"]
    conv_bias: Float[Tensor, " C"] | None
    dt_bias: Float[Tensor, " H"]
    A_log: Float[Tensor, " H"]
    D: Float[Tensor, " H"]
    time_step_limit: tuple[float, float]
    """The smallest and the largest time step."""


class MambaStepOp(Operation):
    """Bring texts one token further: S <- exp(dt A) S + dt x ⊗ B, y = S C + D x.

    `xBC` and `dt` are cuts of in_proj's output: x, B and C are the sums of the last W inputs, after
    SiLU, and the time step is softplus(dt + dt_bias). `conv` (the last W - 1 inputs of every slot,
    the oldest first) and `ssm` (its state) change in place, in the slots of the rows alone; without
    `slots`, row b is slot b. All is computed in float32 or wider; y has the dtype of `xBC`, and the
    state is rounded once, to the dtype of `ssm`. Without gradients.
    Source: Dao & Gu 2024, "Transformers are SSMs", eq. 1.
    """

    def __call__(
        self,
        xBC: Float[Tensor, "B C"],
        dt: Float[Tensor, "B H"],
        conv: Float[Tensor, "slots Wm1 C"],
        ssm: Float[Tensor, "slots H P N"],
        slots: Int[Tensor, " B"] | None,
        weights: Weights,
    ) -> Float[Tensor, "B I"]:
        return self.select(xBC)(xBC, dt, conv, ssm, slots, weights)


def reference(
    xBC: Float[Tensor, "B C"],
    dt: Float[Tensor, "B H"],
    conv: Float[Tensor, "slots Wm1 C"],
    ssm: Float[Tensor, "slots H P N"],
    slots: Int[Tensor, " B"] | None,
    weights: Weights,
) -> Float[Tensor, "B I"]:
    """Convolve, then run the recurrence for one token."""
    if slots is None:
        slots = torch.arange(xBC.shape[0], device=xBC.device)
    wide = torch.promote_types(xBC.dtype, weights.A_log.dtype)
    heads, size, state_size = ssm.shape[1:]
    window = torch.cat([conv[slots], xBC.to(conv.dtype).unsqueeze(1)], dim=1)  # [B, W, C]
    mixed = torch.einsum("bwc,cw->bc", window.to(wide), weights.conv.to(wide))
    if weights.conv_bias is not None:
        mixed = mixed + weights.conv_bias
    inner = heads * size
    x, B, C = F.silu(mixed).tensor_split([inner, (inner + mixed.shape[1]) // 2], dim=1)
    x = x.unflatten(1, (heads, size))
    repeat = heads * state_size // B.shape[1]
    B, C = (t.unflatten(1, (-1, state_size)).repeat_interleave(repeat, dim=1) for t in (B, C))

    dt = F.softplus(dt.to(wide) + weights.dt_bias).clamp(*weights.time_step_limit)
    decay = torch.exp(-dt * weights.A_log.exp())
    state = decay[..., None, None] * ssm[slots].to(wide)
    state = state + torch.einsum("bh,bhp,bhn->bhpn", dt, x, B)
    y = torch.einsum("bhpn,bhn->bhp", state, C) + weights.D[:, None] * x
    conv[slots], ssm[slots] = window[:, 1:], state.to(ssm.dtype)
    return y.flatten(1).to(xBC.dtype)


mamba_step = MambaStepOp(
    "mamba_step",
    [
        triton_backend(
            "nemotron.ops.mamba_step.triton",
            "mamba_step",
            by_name=True,  # has not run on a GPU yet
        ),
        Backend("reference", reference),
    ],
)
