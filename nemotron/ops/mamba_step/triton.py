"""A token through a Mamba-2 layer by two Triton kernels, which read and write each state once.

The convolution is a launch of its own: every head of a group reads the group's inputs of B and C,
and nobody may shift them before all have.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops import launch
from nemotron.ops.mamba_step import Weights

LOG2_E = tl.constexpr(launch.LOG2_E)

CHANNELS = 128
"""Of the convolution in a program."""
STATES = 2048
"""Numbers of a state in a program: 16 a thread, and 4 programs for a head of Nano."""


@triton.jit
def _convolve(
    x_ptr,
    weight_ptr,
    bias_ptr,
    slots_ptr,
    conv_ptr,
    mixed_ptr,
    x_stride,
    slots_stride,
    conv_stride,
    C,
    W: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < C
    slot = row
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + row * slots_stride).to(tl.int64)
    window = conv_ptr + slot * conv_stride + channel
    total = tl.zeros([CHANNELS], tl.float32)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(W):
        if k < W - 1:
            value = tl.load(window + k * C, mask=inside, other=0.0)
        else:
            value = tl.load(x_ptr + row * x_stride + channel, mask=inside, other=0.0)
        weight = tl.load(weight_ptr + channel * W + k, mask=inside, other=0.0)
        total += value.to(tl.float32) * weight.to(tl.float32)
        if k > 0:
            tl.store(window + (k - 1) * C, value, mask=inside)
    mixed = total / (1 + tl.exp2(-total * LOG2_E))
    tl.store(mixed_ptr + row * C + channel, mixed, mask=inside)


@triton.jit
def _update(
    mixed_ptr,
    dt_ptr,
    dt_bias_ptr,
    A_log_ptr,
    D_ptr,
    slots_ptr,
    ssm_ptr,
    y_ptr,
    dt_stride,
    slots_stride,
    ssm_stride,
    H,
    G,
    smallest,
    largest,
    P: tl.constexpr,
    N: tl.constexpr,
    HEAD: tl.constexpr,
    STATE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    p = tl.program_id(2) * HEAD + tl.arange(0, HEAD)
    n = tl.arange(0, STATE)
    inside = (p < P)[:, None] & (n < N)[None, :]
    slot = row
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + row * slots_stride).to(tl.int64)
    at = ssm_ptr + slot * ssm_stride + head * (P * N) + (p[:, None] * N + n[None, :])
    state = tl.load(at, mask=inside, other=0.0).to(tl.float32)

    inner = H * P
    mixed = mixed_ptr + row * (inner + 2 * G * N)
    x = tl.load(mixed + head * P + p, mask=p < P, other=0.0)
    group = mixed + inner + head // (H // G) * N + n
    B = tl.load(group, mask=n < N, other=0.0)
    C = tl.load(group + G * N, mask=n < N, other=0.0)

    dt = tl.load(dt_ptr + row * dt_stride + head).to(tl.float32) + tl.load(dt_bias_ptr + head)
    # softplus is what it is near 0, too: log(1 + e) = e - e^2/2 + e^3/3 where e is small
    small = tl.exp2(-tl.abs(dt) * LOG2_E)
    series = small * (1 - small * (0.5 - small * (1 / 3 - small * 0.25)))
    above = tl.where(small < 0.01, series, tl.log(1 + small))
    dt = tl.where(dt > 0, dt, 0.0) + above
    dt = tl.where(dt < smallest, smallest, dt)
    dt = tl.where(dt > largest, largest, dt)
    decay = tl.exp2(-dt * tl.exp2(tl.load(A_log_ptr + head) * LOG2_E) * LOG2_E)

    state = decay * state + (dt * x)[:, None] * B[None, :]
    y = tl.sum(state * C[None, :], 1) + tl.load(D_ptr + head) * x
    tl.store(at, state.to(ssm_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + row * inner + head * P + p, y.to(y_ptr.dtype.element_ty), mask=p < P)


def mamba_step(
    xBC: Float[Tensor, "B C"],
    dt: Float[Tensor, "B H"],
    conv: Float[Tensor, "slots Wm1 C"],
    ssm: Float[Tensor, "slots H P N"],
    slots: Int[Tensor, " B"] | None,
    weights: Weights,
) -> Float[Tensor, "B I"]:
    """The reference's formulas in float32; the states are read and written where they lie."""
    rows, channels = xBC.shape
    heads, head_dim, state_size = ssm.shape[1:]
    inner, width = heads * head_dim, weights.conv.shape[1]
    assert xBC.stride(1) == dt.stride(1) == 1, (xBC.stride(), dt.stride())
    assert conv[0].is_contiguous(), conv.stride()
    assert ssm[0].is_contiguous(), ssm.stride()
    mixed = torch.empty(rows, channels, dtype=torch.float32, device=xBC.device)
    y = torch.empty(rows, inner, dtype=xBC.dtype, device=xBC.device)
    if not rows:
        return y
    slots_stride = 0 if slots is None else slots.stride(0)
    _convolve[(rows, triton.cdiv(channels, CHANNELS))](
        xBC,
        weights.conv.contiguous(),
        weights.conv_bias,
        slots,
        conv,
        mixed,
        xBC.stride(0),
        slots_stride,
        conv.stride(0),
        channels,
        W=width,
        CHANNELS=CHANNELS,
    )
    state = launch.power_of_2(state_size)
    head = min(launch.power_of_2(head_dim), max(1, STATES // state))
    _update[(rows, heads, triton.cdiv(head_dim, head))](
        mixed,
        dt,
        weights.dt_bias,
        weights.A_log,
        weights.D,
        slots,
        ssm,
        y,
        dt.stride(0),
        slots_stride,
        ssm.stride(0),
        heads,
        (channels - inner) // (2 * state_size),
        *weights.time_step_limit,
        P=head_dim,
        N=state_size,
        HEAD=head,
        STATE=state,
    )
    return y
