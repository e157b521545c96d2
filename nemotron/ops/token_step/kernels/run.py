"""A step through all layers: one call, in which threads wait for each other between the parts."""

import numpy as np
from numba import njit

from nemotron.ops.jit.barrier import wait
from nemotron.ops.jit.scalars import integers, share
from nemotron.ops.token_step.kernels import records
from nemotron.ops.token_step.kernels.attention import attend
from nemotron.ops.token_step.kernels.experts import mix_experts
from nemotron.ops.token_step.kernels.linear import (
    embed,
    linear,
    normalize_rows,
    square_relu,
)
from nemotron.ops.token_step.kernels.mamba import change_states, mix

_MAMBA, _ATTENTION, _EXPERTS = records.MAMBA, records.ATTENTION, records.EXPERTS


@njit(nogil=True, cache=True)
def run(calls, layers, thread, threads, kind):
    """Pass the tokens of a call through the layers, or change the states by what was kept."""
    call = calls[0]
    if call.counts:
        for number in range(layers.shape[0]):
            if layers[number].kind == _MAMBA:
                change_states(call, layers[number], thread, threads, kind)
        wait(call.counter, threads)
        return
    if call.tokens:
        tokens = integers(call.tokens, call.rows * call.length)
        embed(call, tokens, thread, threads, kind)
        wait(call.counter, threads)
    for number in range(layers.shape[0]):
        layer = layers[number]
        if layer.kind == _EXPERTS:
            mix_experts(call, layer, thread, threads, kind)
        else:
            _mix(call, layer, thread, threads, kind)
        wait(call.counter, threads)
    normalize_rows(call, call.result, call.final_norm, call.eps, thread, threads)
    wait(call.counter, threads)


@njit
def _mix(call, layer, thread, threads, kind):
    """Norm, first projection, what lies between, last projection onto the residual stream."""
    tokens = call.rows * call.length
    normalize_rows(call, call.x, layer.norm, layer.eps, thread, threads)
    wait(call.counter, threads)
    linear(
        call.x_rows, call.wide_rows, tokens, layer.first, call.size, layer.first_blocks,
        True, thread, threads, kind,
    )  # fmt: skip
    wait(call.counter, threads)
    source = call.mid_rows
    if layer.kind == _MAMBA:
        mix(call, layer, thread, threads, kind)
    elif layer.kind == _ATTENTION:
        attend(call, layer, thread, threads, kind)
    else:
        source = call.wide_rows
        first, last = share(tokens, thread, threads)
        for token in range(first, last):
            square_relu(call.wide + token * call.wide_width * 4, layer.last_count)
    wait(call.counter, threads)
    linear(
        source, call.hidden_rows, tokens, layer.last, layer.last_count, layer.last_blocks,
        False, thread, threads, kind,
    )  # fmt: skip


@njit(nogil=True, cache=True)
def multiply(xs, ys, rows, weight, count, blocks, counter, thread, threads, kind):
    """y = x W for rows at the addresses in `xs` and `ys`."""
    linear(xs, ys, rows, weight, count, blocks, True, thread, threads, kind)
    wait(counter, threads)


FORMATS = {"float32": np.float32, "bfloat16": np.uint16}
"""What names the number format of weights and caches for a kernel."""
