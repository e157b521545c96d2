"""Rows through the experts: both products and the activation between them for a block of rows.

What is between the products stays in a core's cache, and of it the rows before the activation are
kept, as strips in the format of x. Backward, a unit is a block of rows first, then a part of a
matrix's gradient; so no bit depends on the number of threads.
"""

import numpy as np
from numba import njit

from nemotron.ops.grouped_linear.kernels import (
    add_up,
    block_of,
    multiply_rows,
    parts,
    pieces,
    read_block,
    read_straight,
    read_transposed,
)
from nemotron.ops.jit.barrier import take, wait
from nemotron.ops.jit.lanes import (
    fma,
    load,
    positive,
    read,
    rounded,
    splat,
    store,
    total,
    write,
    zeros,
)
from nemotron.ops.jit.matrices import ROWS, fill_up, multiply_block, strips_of
from nemotron.ops.jit.scalars import floats, item_size, items
from nemotron.ops.jit.strips import ROW
from nemotron.ops.jit.vectors import LANES


@njit(nogil=True, cache=True)
def forward(address, thread, threads, kind):
    """Fill y and, as strips, the rows before the activation."""
    call = items(address, 1, CALL)[0]
    scratch = call.scratch + thread * call.scratch_size
    inner, outer = strips_of(call.inner), strips_of(call.outer)
    ups = call.groups * pieces(call.outer)
    units = ups + call.groups * pieces(call.inner)
    while units > 0:
        unit = take(call.next)
        if unit >= units:
            break
        if unit < ups:
            read_transposed(call, call.up, call.outer, call.inner, unit, scratch, call.ups, kind)
        else:
            read_transposed(call, call.down, call.inner, call.outer, unit - ups, scratch,
                            call.downs, kind)  # fmt: skip
    wait(call.counter, threads)
    x = scratch
    hidden = x + inner * ROWS * ROW
    result = hidden + outer * ROWS * ROW
    size = inner * outer * LANES * ROW  # of a matrix
    while call.blocks > 0:
        unit = take(call.next + 8)
        if unit >= call.blocks:
            break
        block = block_of(call, unit)
        step = fill_up(block.rows) * ROW
        read_block(block, call.x, call.inner, x, kind)
        multiply_block(x, step, inner, call.ups + block.group * size, outer, hidden)
        activate(call, block, hidden, kind)
        weights = call.downs + block.group * size
        multiply_rows(block, hidden, outer, weights, call.y, call.inner, result, kind)
    wait(call.counter, threads)


@njit
def activate(call, block, hidden, kind):
    """Keep a block's rows before the activation, rounded, and put the activated ones there."""
    padded = fill_up(block.rows)
    kept = call.hidden + block.place * strips_of(call.outer) * LANES * item_size(kind)
    for row in range(padded):
        weight = _weight(call, block, row)
        for strip in range(strips_of(call.outer)):
            place = strip * padded + row
            at = kept + place * LANES * item_size(kind)
            write(at, load(hidden + place * ROW), kind)
            number = positive(read(at, kind))
            y = rounded(number * number * splat(weight), np.float32, kind)
            store(hidden + place * ROW, y)


@njit
def _weight(call, block, row):
    """Return the weight of a block's row; of what fills it up, 0."""
    if row >= block.rows:
        return np.float32(0.0)
    return floats(call.weights + block.first * 4, block.rows)[row]


@njit(nogil=True, cache=True)
def backward(address, thread, threads, kind):
    """Fill dx, dup, ddown and the gradient of the weights, the latter three in float32."""
    call = items(address, 1, CALL)[0]
    scratch = call.scratch + thread * call.scratch_size
    inner = strips_of(call.inner)
    ups = call.groups * pieces(call.outer) if call.dx else 0
    units = ups + call.groups * pieces(call.inner) + call.blocks
    while units > 0:
        unit = take(call.next)
        if unit >= units:
            break
        if unit < ups:
            read_straight(call, call.up, call.outer, call.inner, unit, call.ups, kind)
        elif unit < units - call.blocks:
            read_straight(call, call.down, call.inner, call.outer, unit - ups, call.downs, kind)
        else:
            block = block_of(call, unit - (units - call.blocks))
            place = block.place * inner * ROW
            read_block(block, call.dy, call.inner, call.slopes + place, kind)
            if call.dup:
                read_block(block, call.x, call.inner, call.rows + place, kind)
    wait(call.counter, threads)
    while call.blocks > 0:
        unit = take(call.next + 8)
        if unit >= call.blocks:
            break
        _go_back(call, block_of(call, unit), scratch, kind)
    wait(call.counter, threads)
    ups = call.groups * parts(call.outer, call.inner) if call.dup else 0
    units = ups + (call.groups * parts(call.inner, call.outer) if call.ddown else 0)
    while units > 0:
        unit = take(call.next + 16)
        if unit >= units:
            break
        if unit < ups:
            add_up(call, call.inside, call.outer, call.rows, call.inner, unit, scratch,
                   call.dup)  # fmt: skip
        else:
            add_up(call, call.slopes, call.inner, call.activated, call.outer, unit - ups, scratch,
                   call.ddown)  # fmt: skip
    wait(call.counter, threads)


@njit
def _go_back(call, block, scratch, kind):
    """Go back through a block of rows: their gradient, that inside, and the activated rows."""
    inner, outer = strips_of(call.inner), strips_of(call.outer)
    padded, size = fill_up(block.rows), inner * outer * LANES * ROW
    inside, activated = (
        call.inside + block.place * outer * ROW,
        call.activated + block.place * outer * ROW,
    )
    slopes, weights = call.slopes + block.place * inner * ROW, call.downs + block.group * size
    multiply_block(slopes, padded * ROW, inner, weights, outer, inside)
    differentiate(call, block, inside, activated, kind)
    if call.dx:
        weights = call.ups + block.group * size
        multiply_rows(block, inside, outer, weights, call.dx, call.inner, scratch, kind)


@njit
def differentiate(call, block, inside, activated, kind):
    """Turn the gradient behind the activation into that before it; write the activated rows."""
    padded, outer = fill_up(block.rows), strips_of(call.outer)
    kept = call.hidden + block.place * outer * LANES * item_size(kind)
    for row in range(padded):
        weight, inner_sum = splat(_weight(call, block, row)), zeros()
        for strip in range(outer):
            place = strip * padded + row
            number = positive(read(kept + place * LANES * item_size(kind), kind))
            slope, square = load(inside + place * ROW), number * number
            inner_sum = fma(square, slope, inner_sum)
            store(activated + place * ROW, rounded(square * weight, np.float32, kind))
            store(inside + place * ROW, number * slope * (weight + weight))
        if row < block.rows:
            floats(call.dweights + block.first * 4, block.rows)[row] = total(inner_sum)


FIELDS = ("inner", "outer", "groups", "blocks", "table", "bounds", "wide", "next")
TENSORS = ("x", "weights", "up", "down", "ups", "downs", "hidden", "y", "dy", "slopes", "rows")
GRADIENTS = ("inside", "activated", "dx", "dweights", "dup", "ddown")
CALL = np.dtype(
    [
        (name, np.int64)
        for name in (*FIELDS, *TENSORS, *GRADIENTS, "scratch", "scratch_size", "counter")
    ]
)
"""Sizes and addresses; `next` is of numbers of units that are taken."""
KERNELS = (forward, backward)
