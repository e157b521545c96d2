"""Norms in one pass over each row, and their gradients in another.

A unit is a block of rows. Gradients of the gain are added up for each unit, then over the units in
their order, so no bit depends on the number of threads. Loops write to one place each: with more,
the compiler would have too many pairs of addresses to tell apart, and would make no vectors of it.
"""

import numpy as np
from numba import njit

from nemotron.ops.jit.barrier import wait
from nemotron.ops.jit.scalars import (
    decode,
    encode,
    floats,
    item_size,
    items,
    share,
    sigmoid,
)
from nemotron.ops.jit.vectors import dot

ROWS = 128
"""Of a unit."""
ONE = np.float32(1.0)


@njit(nogil=True, cache=True)
def forward(address, thread, threads, kind):
    """Fill y and the scale of each row."""
    call = items(address, 1, CALL)[0]
    wide = call.scratch + thread * call.scratch_size
    first, last = share(call.rows, thread, threads)
    values, weight = floats(wide, call.size), floats(call.weight, call.size)
    for row in range(first, last):
        x = items(call.x + row * call.x_row * item_size(kind), call.size, kind)
        y = items(call.y + row * call.size * item_size(kind), call.size, kind)
        for c in range(call.size):
            values[c] = decode(x[c])
        scale = _scale(wide, call.size, call.eps)
        floats(call.scale, call.rows)[row] = scale
        for c in range(call.size):
            y[c] = encode(values[c] * scale * weight[c], kind)
    wait(call.counter, threads)


@njit
def _scale(values, size, eps):
    """Return 1 / sqrt(mean(x²) + eps)."""
    mean = dot(values, values, size, np.float32) / np.float32(size)
    return ONE / np.sqrt(mean + np.float32(eps))


@njit(nogil=True, cache=True)
def backward(address, thread, threads, kind):
    """Fill dx and each unit's part of the gain's gradient."""
    call = items(address, 1, CALL)[0]
    unit_values = call.scratch + thread * call.scratch_size
    inner = unit_values + call.size * 4
    first, last = share(call.units, thread, threads)
    for number in range(first, last):
        part = floats(call.parts + number * call.size * 4, call.size)
        part[:] = np.float32(0.0)
        for row in range(number * ROWS, min((number + 1) * ROWS, call.rows)):
            _retreat(call, row, unit_values, inner, part, kind)
    wait(call.counter, threads)


@njit
def _retreat(call, row, unit_values, inner, part, kind):
    x = items(call.x + row * call.x_row * item_size(kind), call.size, kind)
    dy = items(call.dy + row * call.dy_row * item_size(kind), call.size, kind)
    dx = items(call.dx + row * call.size * item_size(kind), call.size, kind)
    weight, scale = floats(call.weight, call.size), floats(call.scale, call.rows)[row]
    units, inners = floats(unit_values, call.size), floats(inner, call.size)
    for c in range(call.size):
        units[c] = decode(x[c]) * scale
    for c in range(call.size):
        part[c] += units[c] * decode(dy[c])
    for c in range(call.size):
        inners[c] = decode(dy[c]) * weight[c]
    shared = dot(unit_values, inner, call.size, np.float32) / np.float32(call.size)
    for c in range(call.size):
        dx[c] = encode((inners[c] - units[c] * shared) * scale, kind)


@njit(nogil=True, cache=True)
def gated_forward(address, thread, threads, kind):
    """Fill y and the scale of each row's groups; x is multiplied by silu(z) first."""
    call = items(address, 1, CALL)[0]
    wide = call.scratch + thread * call.scratch_size
    first, last = share(call.rows, thread, threads)
    values, weight = floats(wide, call.size), floats(call.weight, call.size)
    width = call.size // max(call.groups, 1)  # nothing is done with no groups
    for row in range(first, last):
        x = items(call.x + row * call.x_row * item_size(kind), call.size, kind)
        z = items(call.z + row * call.z_row * item_size(kind), call.size, kind)
        y = items(call.y + row * call.size * item_size(kind), call.size, kind)
        for c in range(call.size):
            gate = decode(z[c])
            values[c] = decode(x[c]) * (gate * sigmoid(gate))
        for group in range(call.groups):
            begin = group * width
            scale = _scale(wide + begin * 4, width, call.eps)
            floats(call.scale, call.rows * call.groups)[row * call.groups + group] = scale
            for c in range(begin, begin + width):
                y[c] = encode(values[c] * scale * weight[c], kind)
    wait(call.counter, threads)


@njit(nogil=True, cache=True)
def gated_backward(address, thread, threads, kind):
    """Fill dx, dz and each unit's part of the gain's gradient."""
    call = items(address, 1, CALL)[0]
    scratch = call.scratch + thread * call.scratch_size
    first, last = share(call.units, thread, threads)
    for number in range(first, last):
        part = floats(call.parts + number * call.size * 4, call.size)
        part[:] = np.float32(0.0)
        for row in range(number * ROWS, min((number + 1) * ROWS, call.rows)):
            _gated_retreat(call, row, scratch, part, kind)
    wait(call.counter, threads)


@njit
def _gated_retreat(call, row, scratch, part, kind):
    size, width = call.size, call.size // call.groups
    x = items(call.x + row * call.x_row * item_size(kind), size, kind)
    z = items(call.z + row * call.z_row * item_size(kind), size, kind)
    dy = items(call.dy + row * call.dy_row * item_size(kind), size, kind)
    dx = items(call.dx + row * size * item_size(kind), size, kind)
    dz = items(call.dz + row * size * item_size(kind), size, kind)
    weight = floats(call.weight, size)
    units, inners = floats(scratch, size), floats(scratch + size * 4, size)
    gates, silus = floats(scratch + size * 8, size), floats(scratch + size * 12, size)
    for c in range(size):
        gates[c] = sigmoid(decode(z[c]))
    for c in range(size):
        silus[c] = decode(z[c]) * gates[c]
    for c in range(size):
        units[c] = decode(x[c]) * silus[c]
    for c in range(size):
        inners[c] = decode(dy[c]) * weight[c]
    for group in range(call.groups):
        begin = group * width
        scale = floats(call.scale, call.rows * call.groups)[row * call.groups + group]
        for c in range(begin, begin + width):
            units[c] *= scale
        shared = dot(scratch + begin * 4, scratch + (size + begin) * 4, width, np.float32)
        shared /= np.float32(width)
        for c in range(begin, begin + width):
            inners[c] = (inners[c] - units[c] * shared) * scale
    for c in range(size):
        part[c] += units[c] * decode(dy[c])
    for c in range(size):
        dx[c] = encode(inners[c] * silus[c], kind)
    for c in range(size):
        # d silu / dz = sigmoid + silu (1 - sigmoid)
        gates[c] += silus[c] * (ONE - gates[c])
    for c in range(size):
        dz[c] = encode(inners[c] * decode(x[c]) * gates[c], kind)


SIZES = ("rows", "units", "size", "groups")
PLACES = (
    *("x", "x_row", "z", "z_row", "weight", "scale", "y", "dy", "dy_row", "dx", "dz", "parts"),
    *("scratch", "scratch_size", "counter"),
)
CALL = np.dtype([(name, np.int64) for name in (*SIZES, *PLACES)] + [("eps", np.float64)])
"""Sizes, addresses, and strides in numbers."""
KERNELS = (forward, backward, gated_forward, gated_backward)
