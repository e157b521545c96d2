"""Norms in one pass over each row, and their gradients in another.

A unit is a block of rows. Gradients of the gain are added up for each unit, then over the units in
their order, so no bit depends on the number of threads. Sixteen numbers of a row are worked on
together; the last of a row or group may be fewer.
"""

import numpy as np
from numba import njit

from nemotron.ops.jit.barrier import wait
from nemotron.ops.jit.lanes import (
    fma,
    load,
    read_some,
    sigmoid,
    splat,
    store,
    total,
    write_some,
    zeros,
)
from nemotron.ops.jit.scalars import floats, item_size, items, share
from nemotron.ops.jit.strips import ROW
from nemotron.ops.jit.vectors import LANES

ROWS = 128
"""Of a unit."""
F32 = np.float32
ONE = np.float32(1.0)


@njit(nogil=True, cache=True)
def forward(address, thread, threads, kind):
    """Fill y and the scale of each row."""
    call = items(address, 1, CALL)[0]
    first, last = share(call.rows, thread, threads)
    for row in range(first, last):
        x = call.x + row * call.x_row * item_size(kind)
        y = call.y + row * call.size * item_size(kind)
        squares = zeros()
        for c in range(0, call.size, LANES):
            number = read_some(x + c * item_size(kind), call.size - c, kind)
            squares = fma(number, number, squares)
        scale = _scale(squares, call.size, call.eps)
        floats(call.scale, call.rows)[row] = scale
        scales = splat(scale)
        for c in range(0, call.size, LANES):
            left = call.size - c
            number = read_some(x + c * item_size(kind), left, kind) * scales
            gain = read_some(call.weight + c * 4, left, F32)
            write_some(y + c * item_size(kind), number * gain, left, kind)
    wait(call.counter, threads)


@njit
def _scale(squares, size, eps):
    """Return 1 / sqrt(mean(x²) + eps)."""
    return ONE / np.sqrt(total(squares) / np.float32(size) + np.float32(eps))


@njit(nogil=True, cache=True)
def backward(address, thread, threads, kind):
    """Fill dx and each unit's part of the gain's gradient."""
    call = items(address, 1, CALL)[0]
    first, last = share(call.units, thread, threads)
    for number in range(first, last):
        part = call.parts + number * call.size * 4
        floats(part, call.size)[:] = np.float32(0.0)
        for row in range(number * ROWS, min((number + 1) * ROWS, call.rows)):
            _retreat(call, row, part, kind)
    wait(call.counter, threads)


@njit
def _retreat(call, row, part, kind):
    x = call.x + row * call.x_row * item_size(kind)
    dy = call.dy + row * call.dy_row * item_size(kind)
    dx = call.dx + row * call.size * item_size(kind)
    scale = splat(floats(call.scale, call.rows)[row])
    inner = zeros()
    for c in range(0, call.size, LANES):
        left = call.size - c
        unit = read_some(x + c * item_size(kind), left, kind) * scale
        slope = read_some(dy + c * item_size(kind), left, kind)
        inner = fma(unit, slope * read_some(call.weight + c * 4, left, F32), inner)
        added = fma(unit, slope, read_some(part + c * 4, left, F32))
        write_some(part + c * 4, added, left, F32)
    shared = splat(total(inner) / np.float32(call.size))
    for c in range(0, call.size, LANES):
        left = call.size - c
        unit = read_some(x + c * item_size(kind), left, kind) * scale
        slope = read_some(dy + c * item_size(kind), left, kind)
        slope = slope * read_some(call.weight + c * 4, left, F32) - unit * shared
        write_some(dx + c * item_size(kind), slope * scale, left, kind)


@njit(nogil=True, cache=True)
def gated_forward(address, thread, threads, kind):
    """Fill y and the scale of each row's groups; x is multiplied by silu(z) first."""
    call = items(address, 1, CALL)[0]
    values = call.scratch + thread * call.scratch_size
    first, last = share(call.rows, thread, threads)
    width = call.size // max(call.groups, 1)  # nothing is done with no groups
    for row in range(first, last):
        for group in range(call.groups):
            begin = group * width
            x = call.x + (row * call.x_row + begin) * item_size(kind)
            z = call.z + (row * call.z_row + begin) * item_size(kind)
            y = call.y + (row * call.size + begin) * item_size(kind)
            squares = zeros()
            for c in range(0, width, LANES):
                gate = read_some(z + c * item_size(kind), width - c, kind)
                number = read_some(x + c * item_size(kind), width - c, kind)
                number = number * (gate * sigmoid(gate))
                store(values + c * 4, number)
                squares = fma(number, number, squares)
            scale = _scale(squares, width, call.eps)
            floats(call.scale, call.rows * call.groups)[row * call.groups + group] = scale
            scales = splat(scale)
            for c in range(0, width, LANES):
                gain = read_some(call.weight + (begin + c) * 4, width - c, F32)
                number = load(values + c * 4) * scales * gain
                write_some(y + c * item_size(kind), number, width - c, kind)
    wait(call.counter, threads)


@njit(nogil=True, cache=True)
def gated_backward(address, thread, threads, kind):
    """Fill dx, dz and each unit's part of the gain's gradient."""
    call = items(address, 1, CALL)[0]
    scratch = call.scratch + thread * call.scratch_size
    first, last = share(call.units, thread, threads)
    for number in range(first, last):
        part = call.parts + number * call.size * 4
        floats(part, call.size)[:] = np.float32(0.0)
        for row in range(number * ROWS, min((number + 1) * ROWS, call.rows)):
            for group in range(call.groups):
                _gated_retreat(call, row, group, scratch, part, kind)
    wait(call.counter, threads)


@njit
def _gated_retreat(call, row, group, scratch, part, kind):
    width = call.size // call.groups
    begin = group * width
    x = call.x + (row * call.x_row + begin) * item_size(kind)
    z = call.z + (row * call.z_row + begin) * item_size(kind)
    dy = call.dy + (row * call.dy_row + begin) * item_size(kind)
    place = (row * call.size + begin) * item_size(kind)
    dx, dz = call.dx + place, call.dz + place
    part, weight = part + begin * 4, call.weight + begin * 4
    one = splat(ONE)
    scale = splat(floats(call.scale, call.rows * call.groups)[row * call.groups + group])
    inner = zeros()
    for c in range(0, width, LANES):
        left = width - c
        gate = read_some(z + c * item_size(kind), left, kind)
        open_by = sigmoid(gate)
        silu = gate * open_by
        number = read_some(x + c * item_size(kind), left, kind)
        unit = number * silu * scale
        slope = read_some(dy + c * item_size(kind), left, kind)
        added = fma(unit, slope, read_some(part + c * 4, left, F32))
        write_some(part + c * 4, added, left, F32)
        slope = slope * read_some(weight + c * 4, left, F32)
        inner = fma(unit, slope, inner)
        # d silu / dz = sigmoid + silu (1 - sigmoid)
        by_gate = number * fma(silu, one - open_by, open_by)
        at = scratch + c // LANES * 4 * ROW
        store(at, unit)
        store(at + ROW, slope)
        store(at + 2 * ROW, silu)
        store(at + 3 * ROW, by_gate)
    shared = splat(total(inner) / np.float32(width))
    for c in range(0, width, LANES):
        at = scratch + c // LANES * 4 * ROW
        slope = (load(at + ROW) - load(at) * shared) * scale
        write_some(dx + c * item_size(kind), slope * load(at + 2 * ROW), width - c, kind)
        write_some(dz + c * item_size(kind), slope * load(at + 3 * ROW), width - c, kind)


SIZES = ("rows", "units", "size", "groups")
PLACES = (
    *("x", "x_row", "z", "z_row", "weight", "scale", "y", "dy", "dy_row", "dx", "dz", "parts"),
    *("scratch", "scratch_size", "counter"),
)
CALL = np.dtype([(name, np.int64) for name in (*SIZES, *PLACES)] + [("eps", np.float64)])
"""Sizes, addresses, and strides in numbers."""
KERNELS = (forward, backward, gated_forward, gated_backward)
