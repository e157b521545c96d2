"""Causal convolution with SiLU by two Triton kernels, which read each input and gradient once.

A program takes some channels of a strip of tokens and walks along the tokens. The last W inputs are
in registers, so a window costs one load; backward keeps the gradients of the last W sums, too.
"""
# mypy: disable-error-code="assignment"
# because tuples grow while Triton unrolls a loop

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops import launch
from nemotron.ops.tuning.tunable import Tunable

LOG2_E = tl.constexpr(launch.LOG2_E)

# a program walks over a multiple of so many tokens, so that few lengths are compiled
STRIP_MULTIPLE = 64


@triton.jit
def _load_token(ptr, token, inside, stride, channels, C):
    """Load the channels of one token; zeros where `inside`, a scalar, is false."""
    end = tl.where(inside, C, 0)
    at = ptr + token.to(tl.int64) * stride + channels
    return tl.load(at, mask=channels < end, other=0.0)


@triton.jit
def _load_weights(weight_ptr, bias_ptr, stride_c, stride_w, channels, C, W: tl.constexpr):
    """Load the W weights of each channel, that of the oldest input first, and the bias."""
    weights = ()
    for k in tl.static_range(W):
        at = weight_ptr + channels * stride_c + k * stride_w
        weights += (tl.load(at, mask=channels < C, other=0.0).to(tl.float32),)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channels, mask=channels < C, other=0.0).to(tl.float32)
    else:
        bias = tl.zeros(channels.shape, tl.float32)
    return weights, bias


@triton.jit
def _load_before(
    x_ptr, state_ptr, ids_ptr, first, T, x_stride, state_stride, channels, C, W: tl.constexpr
):
    """Load the W-1 inputs before token `first`, and their documents where there are any."""
    inputs = ()
    ids = ()
    for k in tl.static_range(W - 1):
        token = first - (W - 1) + k
        inside = (token >= 0) & (token < T)
        value = _load_token(x_ptr, token, inside, x_stride, channels, C).to(tl.float32)
        if state_ptr is not None:
            at = token + (W - 1)
            value += _load_token(state_ptr, at, token < 0, state_stride, channels, C).to(tl.float32)
        inputs += (value,)
        if ids_ptr is not None:
            # what comes before the row belongs to document 0
            ids += (tl.load(ids_ptr + token, mask=inside, other=0),)
    return inputs, ids


@triton.jit
def _of_the_same_document(values, ids, k: tl.constexpr, this: tl.constexpr):
    """Return entry k, or zeros where the token of entry `this` is in another document."""
    return values[k] if len(ids) == 0 else tl.where(ids[k] == ids[this], values[k], 0.0)


@triton.jit(do_not_specialize=["T", "strips"])
def _forward(
    x_ptr,
    weight_ptr,
    bias_ptr,
    state_ptr,
    ids_ptr,
    y_ptr,
    T,
    C,
    strips,
    x_stride_b,
    x_stride_t,
    weight_stride_c,
    weight_stride_w,
    state_stride_b,
    state_stride_t,
    ids_stride_b,
    W: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STEPS: tl.constexpr,
    UNROLL: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = (tl.program_id(1) // strips).to(tl.int64)
    first = (tl.program_id(1) % strips) * STEPS
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    x_ptr += row * x_stride_b
    y_ptr += row * T * C
    if state_ptr is not None:
        state_ptr += row * state_stride_b
    if ids_ptr is not None:
        ids_ptr += row * ids_stride_b
    weights, bias = _load_weights(
        weight_ptr, bias_ptr, weight_stride_c, weight_stride_w, channels, C, W
    )
    inputs, ids = _load_before(
        x_ptr, state_ptr, ids_ptr, first, T, x_stride_t, state_stride_t, channels, C, W
    )
    for start in range(0, STEPS, UNROLL):
        new = ()
        new_ids = ()
        for step in tl.static_range(UNROLL):
            token = first + start + step
            new += (_load_token(x_ptr, token, token < T, x_stride_t, channels, C),)
            if ids_ptr is not None:
                new_ids += (tl.load(ids_ptr + token, mask=token < T, other=0),)
        for step in tl.static_range(UNROLL):
            token = first + start + step
            inputs += (new[step].to(tl.float32),)
            if ids_ptr is not None:
                ids += (new_ids[step],)
            y = bias
            for k in tl.static_range(W):
                y += weights[k] * _of_the_same_document(inputs, ids, k, W - 1)
            if ACTIVATION:
                y /= 1 + tl.exp2(y * -LOG2_E)
            end = tl.where(token < T, C, 0)
            at = y_ptr + token.to(tl.int64) * C + channels
            tl.store(at, y.to(y_ptr.dtype.element_ty), mask=channels < end)
            inputs = inputs[1:]
            ids = ids[1:]


@triton.jit(do_not_specialize=["T", "strips"])
def _backward(
    x_ptr,
    weight_ptr,
    bias_ptr,
    state_ptr,
    ids_ptr,
    grad_ptr,
    grad_x_ptr,
    grad_state_ptr,
    partial_ptr,
    T,
    C,
    strips,
    x_stride_b,
    x_stride_t,
    weight_stride_c,
    weight_stride_w,
    state_stride_b,
    state_stride_t,
    ids_stride_b,
    grad_stride_b,
    grad_stride_t,
    W: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STEPS: tl.constexpr,
    UNROLL: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    # the gradient of input t is known when that of sum t + W - 1 is: so many steps more than tokens
    TOKENS: tl.constexpr = STEPS - (W - 1)
    row = (tl.program_id(1) // strips).to(tl.int64)
    first = (tl.program_id(1) % strips) * TOKENS
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    x_ptr += row * x_stride_b
    grad_ptr += row * grad_stride_b
    grad_x_ptr += row * T * C
    if state_ptr is not None:
        state_ptr += row * state_stride_b
    if grad_state_ptr is not None:
        grad_state_ptr += row * (W - 1) * C
    if ids_ptr is not None:
        ids_ptr += row * ids_stride_b
    weights, bias = _load_weights(
        weight_ptr, bias_ptr, weight_stride_c, weight_stride_w, channels, C, W
    )
    inputs, ids = _load_before(
        x_ptr, state_ptr, ids_ptr, first, T, x_stride_t, state_stride_t, channels, C, W
    )
    zeros = tl.zeros([CHANNELS], tl.float32)
    # of the same tokens as `inputs`; what comes before the strip is another program's
    grad_sums = (zeros,) * (W - 1)
    grad_weights = (zeros,) * W
    grad_bias = zeros
    for start in range(0, STEPS, UNROLL):
        new = ()
        new_grads = ()
        new_ids = ()
        for step in tl.static_range(UNROLL):
            token = first + start + step
            new += (_load_token(x_ptr, token, token < T, x_stride_t, channels, C),)
            grad = _load_token(grad_ptr, token, token < T, grad_stride_t, channels, C)
            new_grads += (grad,)
            if ids_ptr is not None:
                new_ids += (tl.load(ids_ptr + token, mask=token < T, other=0),)
        for step in tl.static_range(UNROLL):
            token = first + start + step
            inputs += (new[step].to(tl.float32),)
            if ids_ptr is not None:
                ids += (new_ids[step],)
            grad = new_grads[step].to(tl.float32)  # zeros after the row
            if ACTIVATION:
                sums = bias
                for k in tl.static_range(W):
                    sums += weights[k] * _of_the_same_document(inputs, ids, k, W - 1)
                sigmoid = 1 / (1 + tl.exp2(sums * -LOG2_E))
                grad *= sigmoid * (1 + sums * (1 - sigmoid))
            grad_sums += (grad,)
            if partial_ptr is not None:
                # the strip's last steps belong to the next one
                own = tl.where(token < first + TOKENS, grad, 0.0)
                grad_bias += own
                added = ()
                for k in tl.static_range(W):
                    part = own * _of_the_same_document(inputs, ids, k, W - 1)
                    added += (grad_weights[k] + part,)
                grad_weights = added
            # the oldest input of the window met the oldest weight in this token's sum
            grad_x = zeros
            for k in tl.static_range(W):
                grad_x += weights[W - 1 - k] * _of_the_same_document(grad_sums, ids, k, 0)
            oldest = token - (W - 1)
            end = tl.where((oldest >= first) & (oldest < T), C, 0)
            at = grad_x_ptr + oldest.to(tl.int64) * C + channels
            tl.store(at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=channels < end)
            if grad_state_ptr is not None:
                end = tl.where(oldest < 0, C, 0)
                at = grad_state_ptr + token * C + channels
                tl.store(at, grad_x.to(grad_state_ptr.dtype.element_ty), mask=channels < end)
            inputs = inputs[1:]
            grad_sums = grad_sums[1:]
            ids = ids[1:]
    if partial_ptr is not None:
        at = partial_ptr + tl.program_id(1).to(tl.int64) * (W + 1) * C + channels
        for k in tl.static_range(W):
            tl.store(at + k * C, grad_weights[k], mask=channels < C)
        tl.store(at + W * C, grad_bias, mask=channels < C)


# `unroll` loads are on their way in a thread before the first is used
FORWARD = Tunable(
    "causal_conv1d",
    "forward",
    (_forward,),
    ("rows", "tokens", "channels"),
    # 4 channels a thread: 8 bytes of bfloat16 a load; 12 programs fit each of the 132
    # multiprocessors of an H100: then all run at once
    {"channels": 256, "warps": 2, "unroll": 8, "programs": 1584},
    {
        "channels": (128, 256, 512),
        "warps": (1, 2, 4, 8),
        "unroll": (4, 8, 16),
        "programs": (792, 1056, 1584, 2112, 3168, 6336),
    },
)
BACKWARD = Tunable(
    "causal_conv1d",
    "backward",
    (_backward,),
    ("rows", "tokens", "channels"),
    # 2 channels a thread, as each needs more registers; 5 programs fit
    {"channels": 256, "warps": 4, "unroll": 8, "programs": 660},
    {
        "channels": (128, 256, 512),
        "warps": (1, 2, 4, 8),
        "unroll": (4, 8, 16),
        "programs": (396, 528, 660, 1056, 1320, 2640),
    },
    # the length of a strip, and so which tokens a partial sum has, follows from all three
    reorders=("channels", "unroll", "programs"),
)


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial_state: Tensor | None,
        seq_idx: Tensor | None,
        activation: bool,
    ) -> Tensor:
        x = _dense(x)
        bias, initial_state, seq_idx = (
            None if t is None else _dense(t) for t in (bias, initial_state, seq_idx)
        )
        ctx.save_for_backward(x, weight, bias, initial_state, seq_idx)
        ctx.activation = activation
        rows, length, channels = x.shape
        found = FORWARD.at(x, rows, length, channels)
        blocks = triton.cdiv(channels, found["channels"])
        steps = _steps(length, found["programs"] // (rows * blocks))
        strips = triton.cdiv(length, steps)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _forward[(blocks, rows * strips)](
            x,
            weight,
            bias,
            initial_state,
            seq_idx,
            y,
            length,
            channels,
            strips,
            *_strides(x, weight, initial_state, seq_idx),
            W=weight.shape[1],
            ACTIVATION=activation,
            STEPS=steps,
            UNROLL=found["unroll"],
            CHANNELS=found["channels"],
            num_warps=found["warps"],
        )
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, initial_state, seq_idx = ctx.saved_tensors
        grad = _dense(grad)
        rows, length, channels = x.shape
        width = weight.shape[1]
        found = BACKWARD.at(x, rows, length, channels)
        blocks = triton.cdiv(channels, found["channels"])
        steps = _steps(length, found["programs"] // (rows * blocks), extra=width - 1)
        strips = triton.cdiv(length, steps - (width - 1))
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _, needs_weight, needs_bias, needs_state, *_ = ctx.needs_input_grad
        grad_state = partial = None
        if needs_state:
            shape = initial_state.shape
            grad_state = torch.empty(shape, dtype=initial_state.dtype, device=x.device)
        if needs_weight or needs_bias:
            shape = (rows * strips, width + 1, channels)
            partial = torch.empty(shape, dtype=torch.float32, device=x.device)
        _backward[(blocks, rows * strips)](
            x,
            weight,
            bias,
            initial_state,
            seq_idx,
            grad,
            grad_x,
            grad_state,
            partial,
            length,
            channels,
            strips,
            *_strides(x, weight, initial_state, seq_idx),
            grad.stride(0),
            grad.stride(1),
            W=width,
            ACTIVATION=ctx.activation,
            STEPS=steps,
            UNROLL=found["unroll"],
            CHANNELS=found["channels"],
            num_warps=found["warps"],
        )
        grad_weight = grad_bias = None
        if partial is not None:
            sums = partial.sum(0)
            grad_weight = sums[:width].T.to(weight.dtype) if needs_weight else None
            grad_bias = sums[width].to(bias.dtype) if needs_bias else None
        return grad_x, grad_weight, grad_bias, grad_state, None, None


def _dense(values: Tensor) -> Tensor:
    """Return a tensor whose last dimension lies in one piece; a copy only where needed."""
    return values if values.stride(-1) == 1 else values.contiguous()


def _steps(length: int, strips: int, extra: int = 0) -> int:
    """Return over how many tokens a program walks where about that many strips make a row.

    It leaves results for all of them but `extra`.
    """
    tokens = triton.cdiv(length, max(1, strips))
    return triton.cdiv(tokens + extra, STRIP_MULTIPLE) * STRIP_MULTIPLE


def _strides(
    x: Tensor, weight: Tensor, initial_state: Tensor | None, seq_idx: Tensor | None
) -> tuple[int, ...]:
    state = (0, 0) if initial_state is None else (initial_state.stride(0), initial_state.stride(1))
    ids = 0 if seq_idx is None else seq_idx.stride(0)
    return (x.stride(0), x.stride(1), *weight.stride(), *state, ids)


def causal_conv1d(
    x: Float[Tensor, "B T C"],
    weight: Float[Tensor, "C W"],
    bias: Float[Tensor, " C"] | None,
    initial_state: Float[Tensor, "B W1 C"] | None,
    seq_idx: Int[Tensor, "B T"] | None,
    activation: bool,
) -> Float[Tensor, "B T C"]:
    """The reference's sum in float32, rounded once, with a hand-written gradient."""
    return _CausalConv.apply(x, weight, bias, initial_state, seq_idx, activation)
