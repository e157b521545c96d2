"""Mamba-2 layers: convolution, recurrence, gate and norm of one group of heads of one text."""

import math

import numpy as np
from numba import njit

from nemotron.ops.jit.scalars import (
    encode,
    exp,
    floats,
    fma,
    integers,
    item_size,
    items,
    share,
)
from nemotron.ops.jit.vectors import LANES, advance, dot
from nemotron.ops.token_step.kernels.elementwise import (
    add_products,
    apply_gate,
    apply_silu,
    copy_bytes,
    round_to,
)
from nemotron.ops.token_step.kernels.sixteen import advance_16


@njit
def mix(call, layer, thread, threads, kind):
    """Mix this thread's share of texts and groups: from `wide` [z, x, B, C, dt] to `mid`.

    With `call.kept`, only the first token of each text changes the states, and what the others
    would change them by is kept there.
    """
    inner = layer.heads * layer.head_size
    scratch = call.scratch + thread * call.scratch_size
    first, last = share(call.rows * layer.groups, thread, threads)
    for unit in range(first, last):
        row, group = unit // layer.groups, unit % layer.groups
        begin = call.wide + row * call.length * call.wide_width * 4
        inputs, stride = begin + inner * 4, call.wide_width * 4
        for token in range(call.length):
            _round_inputs(layer, inputs + token * stride, group, kind)
        ssm = _ssm(call, layer, row, group)
        if call.kept:
            kept = _kept(call, layer, row)
            _keep_inputs(call, layer, inputs, stride, kept, group)
        for token in range(call.length):
            if call.kept and token == 1:
                ssm = _copy(layer, ssm, scratch)
            y = call.mid + (row * call.length + token) * call.mid_width * 4
            y += group * inner // layer.groups * 4
            _step(call, layer, row, group, token, inputs, stride, ssm, y, scratch, kind)
            _gate(layer, y, begin + token * stride, group)
        if not call.kept:
            _shift(call, layer, row, group, call.length, inputs, stride, kind)


@njit
def change_states(call, layer, thread, threads, kind):
    """Change the states by the first tokens of what a call kept, but for the very first one."""
    channels = layer.heads * layer.head_size + 2 * layer.groups * layer.state_size
    counts = integers(call.counts, call.rows)
    scratch = call.scratch + thread * call.scratch_size
    first, last = share(call.rows * layer.groups, thread, threads)
    stride = (channels + layer.heads) * 4
    for unit in range(first, last):
        row, group = unit // layer.groups, unit % layer.groups
        inputs = _kept(call, layer, row)
        ssm = _ssm(call, layer, row, group)
        y = scratch + _scratch_after_convolution(layer)
        for token in range(1, counts[row]):
            _step(call, layer, row, group, token, inputs, stride, ssm, y, scratch, kind)
        _shift(call, layer, row, group, counts[row], inputs, stride, kind)


@njit
def _kept(call, layer, row):
    """Return where a layer keeps its inputs of a row."""
    channels = layer.heads * layer.head_size + 2 * layer.groups * layer.state_size
    before = layer.kept_before * call.rows + row * (channels + layer.heads)
    return call.kept + call.length * before * 4


@njit
def _scratch_after_convolution(layer):
    return (layer.heads * layer.head_size // layer.groups + 2 * layer.state_size) * 4


@njit
def _range(layer, part, group):
    """Return first and number of a group's channels: of x, B or C."""
    inner = layer.heads * layer.head_size
    if part == 0:
        return group * inner // layer.groups, inner // layer.groups
    begin = inner + (part - 1) * layer.groups * layer.state_size
    return begin + group * layer.state_size, layer.state_size


@njit
def _ssm(call, layer, row, group):
    size = layer.heads * layer.head_size * layer.state_size
    slot = integers(call.slots, call.rows)[row]
    return layer.ssm + (slot * size + group * (size // layer.groups)) * 4


@njit
def _copy(layer, ssm, scratch):
    count = layer.heads * layer.head_size // layer.groups * layer.state_size
    address = scratch + _scratch_after_convolution(layer)
    copy_bytes(address, ssm, count * 4)
    return address


@njit
def _round_inputs(layer, inputs, group, kind):
    """Round what is convolved as it is stored for the tokens after it."""
    for part in range(3):
        first, count = _range(layer, part, group)
        round_to(inputs + first * 4, count, kind)


@njit
def _keep_inputs(call, layer, inputs, stride, kept, group):
    channels = layer.heads * layer.head_size + 2 * layer.groups * layer.state_size
    heads = layer.heads // layer.groups
    for token in range(call.length):
        source, target = inputs + token * stride, kept + token * (channels + layer.heads) * 4
        for part in range(3):
            first, count = _range(layer, part, group)
            copy_bytes(target + first * 4, source + first * 4, count * 4)
        first = channels + group * heads
        copy_bytes(target + first * 4, source + first * 4, heads * 4)


@njit
def _state_row(call, layer, row, place, kind):
    """Return the address of an input before the call; the newest has the last place."""
    channels = layer.heads * layer.head_size + 2 * layer.groups * layer.state_size
    slot = integers(call.slots, call.rows)[row]
    return layer.conv + (slot * (layer.window - 1) + place) * channels * item_size(kind)


@njit
def _convolve(call, layer, row, token, inputs, stride, first, count, target, kind):
    """Convolve some channels of a token, with SiLU."""
    channels = layer.heads * layer.head_size + 2 * layer.groups * layer.state_size
    if layer.bias:
        copy_bytes(target, layer.bias + first * 4, count * 4)
    else:
        floats(target, count)[:] = np.float32(0.0)
    for offset in range(layer.window):
        kernel = layer.kernel + (offset * channels + first) * 4
        place = token + offset - (layer.window - 1)
        if place < 0:
            address = _state_row(call, layer, row, layer.window - 1 + place, kind)
            add_products(target, address + first * item_size(kind), kernel, count, kind)
        else:
            add_products(target, inputs + place * stride + first * 4, kernel, count, np.float32)
    apply_silu(target, count)


@njit
def _step(call, layer, row, group, token, inputs, stride, ssm, target, scratch, kind):
    """Do one token's step of the recurrence of a group's heads; write y [heads · size]."""
    begins = scratch, scratch, scratch
    address = scratch
    for part in range(3):
        first, count = _range(layer, part, group)
        _convolve(call, layer, row, token, inputs, stride, first, count, address, kind)
        if part == 0:
            begins = address, begins[1], begins[2]
        elif part == 1:
            begins = begins[0], address, begins[2]
        else:
            begins = begins[0], begins[1], address
        address += count * 4
    x_begin, B, C = begins
    channels = layer.heads * layer.head_size + 2 * layer.groups * layer.state_size
    heads, size = layer.heads // layer.groups, layer.head_size
    x, y = floats(x_begin, heads * size), floats(target, heads * size)
    steps = floats(inputs + token * stride + channels * 4, layer.heads)
    dt_bias, rates = floats(layer.dt_bias, layer.heads), floats(layer.decay, layer.heads)
    skips = floats(layer.skip, layer.heads)
    for place in range(heads):
        head = group * heads + place
        dt = steps[head] + dt_bias[head]
        if dt <= np.float32(20.0):
            dt = np.float32(math.log1p(exp(dt)))
        dt = min(max(dt, layer.smallest), layer.largest)
        decay, skip = exp(dt * rates[head]), skips[head]
        p, end = place * size, (place + 1) * size
        if layer.state_size % LANES == 0:
            while p + LANES <= end:
                state = ssm + p * layer.state_size * 4
                advance_16(
                    state, B, C, decay, dt, skip, x_begin + p * 4, target + p * 4,
                    layer.state_size,
                )  # fmt: skip
                p += LANES
        while p < end:
            state = ssm + p * layer.state_size * 4
            found = advance(state, B, C, decay, dt * x[p], layer.state_size)
            y[p] = fma(skip, x[p], found)
            p += 1


@njit
def _gate(layer, target, z_row, group):
    """y <- norm(y silu(z)) weight, for the channels of a group."""
    first, count = _range(layer, 0, group)
    y, gain = floats(target, count), floats(layer.gate_norm + first * 4, count)
    apply_gate(target, z_row + first * 4, count)
    mean = dot(target, target, count, np.float32) / np.float32(count)
    scale = np.float32(1.0) / np.float32(math.sqrt(mean + layer.gate_eps))
    for i in range(count):
        y[i] = y[i] * scale * gain[i]


@njit
def _shift(call, layer, row, group, length, inputs, stride, kind):
    """Store the newest inputs of the convolution after `length` tokens."""
    if length == 0:
        return
    for part in range(3):
        first, count = _range(layer, part, group)
        for place in range(layer.window - 1):
            address = _state_row(call, layer, row, place, kind)
            target = items(address + first * item_size(kind), count, kind)
            token = length - (layer.window - 1) + place
            if token < 0:
                later = _state_row(call, layer, row, place + length, kind)
                source = later + first * item_size(kind)
                copy_bytes(address + first * item_size(kind), source, count * item_size(kind))
            else:
                source = floats(inputs + token * stride + first * 4, count)
                for i in range(count):
                    target[i] = encode(source[i], kind)
