"""Convolution with SiLU in one pass over the inputs, and its gradient in another.

A unit is a block of tokens of one row. Gradients of the weights are added up for each unit, then
over the units in their order, so no bit depends on the number of threads.
"""

import numpy as np
from numba import njit

from nemotron.ops.jit.barrier import wait
from nemotron.ops.jit.lanes import fma as fma_lanes
from nemotron.ops.jit.lanes import load, read, read_some, sigmoid, splat, store, write, write_some
from nemotron.ops.jit.scalars import (
    decode,
    encode,
    floats,
    fma,
    integers,
    item_size,
    items,
    share,
)
from nemotron.ops.jit.strips import ROW
from nemotron.ops.jit.vectors import LANES

TOKENS = 128
"""Of a unit; the gradient computes width - 1 more."""


@njit(nogil=True, cache=True)
def forward(address, thread, threads, kind):
    """Fill y."""
    call = items(address, 1, CALL)[0]
    sums = call.scratch + thread * call.scratch_size
    first, last = share(call.rows * call.blocks, thread, threads)
    for unit in range(first, last):
        row, begin = unit // call.blocks, unit % call.blocks * TOKENS
        for token in range(begin, min(begin + TOKENS, call.length)):
            _convolve(call, row, token, sums, kind)
            place = (row * call.length + token) * call.channels * item_size(kind)
            for c in range(0, call.channels, LANES):
                value = load(sums + c * 4)
                if call.activation:
                    value = value * sigmoid(value)
                write_some(call.y + place + c * item_size(kind), value, call.channels - c, kind)
    wait(call.counter, threads)


@njit
def _convolve(call, row, token, sums, kind):
    """Write the sum of products of one token, and the bias."""
    if _are_whole(call, row, token):
        _convolve_four(call, row, token, sums, kind)
        return
    values, bias = floats(sums, call.channels), floats(call.bias, call.channels)
    values[:] = np.float32(0.0)
    for offset in range(call.width):
        source = token + offset + 1 - call.width
        if not _is_seen(call, row, token, source):
            continue
        weight = floats(call.weight + offset * call.channels * 4, call.channels)
        if source < 0:
            early = _early(call.state, call, row, source)
            for c in range(call.channels):
                values[c] = fma(early[c], weight[c], values[c])
        else:
            x = _inputs(call, row, source, kind)
            for c in range(call.channels):
                values[c] = fma(decode(x[c]), weight[c], values[c])
    for c in range(call.channels):
        values[c] += bias[c]


@njit
def _are_whole(call, row, last):
    """Say whether four tokens, `last` the last of them, are of one document of x, and in vectors.

    Then the sum of the last one has all four inputs, and the input of the first one all four sums.
    """
    if call.width != 4 or call.channels % LANES or last < 3 or last >= call.length:
        return False
    if not call.ids:
        return True
    ids = integers(call.ids + row * call.length * 8, call.length)
    return ids[last - 3] == ids[last] and ids[last - 2] == ids[last] and ids[last - 1] == ids[last]


@njit
def _convolve_four(call, row, token, sums, kind):
    """Do the same where all inputs are there: one pass in place of five."""
    size, step = item_size(kind), call.x_token * item_size(kind)
    x = call.x + (row * call.x_row + (token - 3) * call.x_token) * size
    row_size = call.channels * 4
    for c in range(0, call.channels, LANES):
        place, weight = x + c * size, call.weight + c * 4
        value = read(place, kind) * load(weight)
        value = fma_lanes(read(place + step, kind), load(weight + row_size), value)
        value = fma_lanes(read(place + 2 * step, kind), load(weight + 2 * row_size), value)
        value = fma_lanes(read(place + 3 * step, kind), load(weight + 3 * row_size), value)
        store(sums + c * 4, value + load(call.bias + c * 4))


@njit
def _is_seen(call, row, token, source):
    """Say whether a token's sum has the input of another one: of its document, or of a state."""
    if source < 0 and not call.state:
        return False
    if not call.ids:
        return True
    ids = integers(call.ids + row * call.length * 8, call.length)
    # what comes before the row belongs to document 0
    return ids[token] == (ids[source] if source >= 0 else 0)


@njit
def _inputs(call, row, token, kind):
    place = (row * call.x_row + token * call.x_token) * item_size(kind)
    return items(call.x + place, call.channels, kind)


@njit
def _early(address, call, row, source):
    """Return an input before the row, in a state's layout."""
    place = row * (call.width - 1) + call.width - 1 + source
    return floats(address + place * call.channels * 4, call.channels)


def numbers(width, channels):
    """Return how many numbers of scratch a thread needs to go back."""
    return (width + 2) * -(-channels // LANES) * LANES


@njit
def _size(call):
    """Return the bytes of a number of each channel in scratch."""
    return -(-call.channels // LANES) * ROW


@njit(nogil=True, cache=True)
def backward(address, thread, threads, kind):
    """Fill dx, the state's gradient, and each unit's part of those of weight and bias."""
    call = items(address, 1, CALL)[0]
    slopes = call.scratch + thread * call.scratch_size
    first, last = share(call.rows * call.blocks, thread, threads)
    for unit in range(first, last):
        row, begin = unit // call.blocks, unit % call.blocks * TOKENS
        parts = call.parts + unit * (call.width + 1) * call.channels * 4
        floats(parts, (call.width + 1) * call.channels)[:] = np.float32(0.0)
        end = min(begin + TOKENS, call.length)
        # a token's inputs reach width - 1 tokens back, so an input's gradient needs as many ahead
        for token in range(begin, end + call.width - 1):
            if token < call.length:
                slope = slopes + token % call.width * _size(call)
                _slope(call, row, token, slope, slopes, kind)
                if token < end:
                    _add_weights(call, row, token, slope, parts, kind)
            source = token - call.width + 1
            if source >= begin or begin == 0:
                _input_gradient(call, row, source, slopes, kind)
    wait(call.counter, threads)


@njit
def _slope(call, row, token, slope, scratch, kind):
    """Write the gradient of one token's sum."""
    dy = call.dy + (row * call.dy_row + token * call.dy_token) * item_size(kind)
    sums = scratch + call.width * _size(call)
    if call.activation:
        _convolve(call, row, token, sums, kind)
    one = splat(np.float32(1.0))
    for c in range(0, call.channels, LANES):
        value = read_some(dy + c * item_size(kind), call.channels - c, kind)
        if call.activation:
            number = load(sums + c * 4)
            gate = sigmoid(number)
            value = value * (gate * (one + number * (one - gate)))
        store(slope + c * 4, value)


@njit
def _add_weights(call, row, token, slope, parts, kind):
    """Add one token's part of the gradients of weight and bias."""
    values = floats(slope, call.channels)
    for offset in range(call.width):
        source = token + offset + 1 - call.width
        if not _is_seen(call, row, token, source):
            continue
        total = floats(parts + offset * call.channels * 4, call.channels)
        if source < 0:
            early = _early(call.state, call, row, source)
            for c in range(call.channels):
                total[c] = fma(early[c], values[c], total[c])
        else:
            x = _inputs(call, row, source, kind)
            for c in range(call.channels):
                total[c] = fma(decode(x[c]), values[c], total[c])
    total = floats(parts + call.width * call.channels * 4, call.channels)
    for c in range(call.channels):
        total[c] += values[c]


@njit
def _input_gradient(call, row, source, slopes, kind):
    """Write the gradient of one input, of x or of the state before the row."""
    if source < 0 and not call.dstate:
        return
    if source >= 0 and _are_whole(call, row, source + 3):
        _four_gradients(call, row, source, slopes, kind)
        return
    values = floats(slopes + (call.width + 1) * _size(call), call.channels)
    values[:] = np.float32(0.0)
    for offset in range(call.width):
        token = source + call.width - 1 - offset
        if token < 0 or token >= call.length or not _is_seen(call, row, token, source):
            continue
        slope = floats(slopes + token % call.width * _size(call), call.channels)
        weight = floats(call.weight + offset * call.channels * 4, call.channels)
        for c in range(call.channels):
            values[c] = fma(weight[c], slope[c], values[c])
    if source < 0:
        _early(call.dstate, call, row, source)[:] = values
        return
    place = (row * call.length + source) * call.channels * item_size(kind)
    target = items(call.dx + place, call.channels, kind)
    for c in range(call.channels):
        target[c] = encode(values[c], kind)


@njit
def _four_gradients(call, row, source, slopes, kind):
    """Do the same for an input of x that four sums have."""
    a, b, c, d = (
        slopes + (source + 3) % 4 * _size(call),
        slopes + (source + 2) % 4 * _size(call),
        slopes + (source + 1) % 4 * _size(call),
        slopes + source % 4 * _size(call),
    )
    dx = call.dx + (row * call.length + source) * call.channels * item_size(kind)
    row_size = call.channels * 4
    for i in range(0, call.channels, LANES):
        at, weight = i * 4, call.weight + i * 4
        value = load(weight) * load(a + at)
        value = fma_lanes(load(weight + row_size), load(b + at), value)
        value = fma_lanes(load(weight + 2 * row_size), load(c + at), value)
        value = fma_lanes(load(weight + 3 * row_size), load(d + at), value)
        write(dx + i * item_size(kind), value, kind)


FIELDS = (
    *("rows", "length", "blocks", "channels", "width", "activation", "x", "x_row", "x_token"),
    *("weight", "bias", "state", "ids", "y", "dy", "dy_row", "dy_token", "dx", "dstate", "parts"),
    *("scratch", "scratch_size", "counter"),
)
CALL = np.dtype([(name, np.int64) for name in FIELDS])
"""Sizes, addresses, and strides in numbers."""
KERNELS = (forward, backward)
