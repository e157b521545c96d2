"""Products of rows by the matrices of their groups, and their gradients, in blocks of rows.

Forward, a unit is a block of rows with all columns of the result. Backward, blocks of rows and of
their gradients are written as strips first; then a unit is a block of the rows' gradient, or a
part of a matrix's gradient with all rows of its group, added up in their order. So no bit depends
on the number of threads. Weights that are float32 beside rows in bfloat16 are rounded when read.
"""

import numpy as np
from numba import carray, njit

from nemotron.ops.jit.barrier import take, wait
from nemotron.ops.jit.matrices import (
    ROWS,
    TALL,
    WIDE,
    add_outer,
    fill_up,
    multiply_block,
    read_rows,
    strips_of,
    turn,
    write_rows,
)
from nemotron.ops.jit.scalars import _pointer, floats, integers, item_size
from nemotron.ops.jit.strips import ROW
from nemotron.ops.jit.vectors import LANES

BLOCK = np.dtype([(name, np.int64) for name in ("group", "first", "rows", "place")])
"""A block of rows of a group: the first one, how many, and how many are before it, filled up."""


@njit(nogil=True, cache=True)
def forward(calls, thread, threads, kind):
    """Fill y: the rows of each group times the transpose of its matrix."""
    call = calls[0]
    scratch = call.scratch + thread * call.scratch_size
    depth, strips = strips_of(call.inner), strips_of(call.outer)
    strip_size = depth * LANES * ROW  # of a transposed matrix
    pieces = -(-call.outer // ROWS)
    units = call.groups * pieces
    while units > 0:
        unit = take(call.next)
        if unit >= units:
            break
        group, piece = unit // pieces, unit % pieces
        filled = _read_weight(call, group, piece, scratch, ROWS * ROW, kind)
        place = group * strips + piece * ROWS // LANES
        turn(scratch, filled, ROWS * ROW, depth, call.packed + place * strip_size)
    wait(call.counter, threads)
    result = scratch + depth * ROWS * ROW
    while call.blocks > 0:
        unit = take(call.next + 8)
        if unit >= call.blocks:
            break
        block = _block(call, unit)
        step = fill_up(block.rows) * ROW
        x = call.x + block.first * call.inner * item_size(kind)
        y = call.y + block.first * call.outer * item_size(kind)
        read_rows(x, block.rows, call.inner, scratch, step, step, kind, kind)
        for strip in range(0, strips, WIDE):
            weights = call.packed + (block.group * strips + strip) * strip_size
            count = min(WIDE, strips - strip)
            multiply_block(scratch, step, depth, weights, count, result)
            write_rows(result, step, block.rows, count, y, call.outer, strip * LANES, kind)
    wait(call.counter, threads)


@njit
def _block(call, number):
    return carray(_pointer(call.table), (call.blocks,), BLOCK)[number]


@njit
def _read_weight(call, group, piece, target, step, kind):
    """Write a piece of a matrix's rows as strips, and return how many they are when filled up."""
    first = piece * ROWS
    rows = min(ROWS, call.outer - first)
    filled = strips_of(rows) * LANES
    place = (group * call.outer + first) * call.inner
    if call.wide:
        read_rows(call.weight + place * 4, rows, call.inner, target, filled * ROW, step,
                  np.float32, kind)  # fmt: skip
    else:
        read_rows(call.weight + place * item_size(kind), rows, call.inner, target, filled * ROW,
                  step, kind, kind)  # fmt: skip
    return filled


@njit(nogil=True, cache=True)
def backward(calls, thread, threads, kind):
    """Fill dx = dy W and dW = dyᵀ x, float32, where they have an address."""
    call = calls[0]
    scratch = call.scratch + thread * call.scratch_size
    inner, outer = strips_of(call.inner), strips_of(call.outer)
    pieces = -(-call.outer // ROWS)
    matrices = call.groups * pieces if call.dx else 0
    while matrices + call.blocks > 0:
        unit = take(call.next)
        if unit >= matrices + call.blocks:
            break
        if unit < matrices:
            group, piece = unit // pieces, unit % pieces
            place = (group * inner * outer * LANES + piece * ROWS) * ROW
            _read_weight(call, group, piece, call.packed + place, outer * LANES * ROW, kind)
        else:
            _read_block(call, unit - matrices, kind)
    wait(call.counter, threads)
    across = -(-inner // WIDE)
    parts = -(-outer // TALL) * across
    matrices = call.groups * parts if call.dweight else 0
    blocks = call.blocks if call.dx else 0
    while matrices + blocks > 0:
        unit = take(call.next + 8)
        if unit >= matrices + blocks:
            break
        if unit < matrices:
            part = unit % parts
            _add_up(call, unit // parts, part // across * TALL, part % across * WIDE, scratch)
        else:
            _go_back(call, unit - matrices, scratch, kind)
    wait(call.counter, threads)


@njit
def _read_block(call, unit, kind):
    """Write a block of rows and its gradient as strips."""
    block = _block(call, unit)
    step = fill_up(block.rows) * ROW
    dy = call.dy + block.first * call.outer * item_size(kind)
    target = call.slopes + block.place * strips_of(call.outer) * ROW
    read_rows(dy, block.rows, call.outer, target, step, step, kind, kind)
    if call.dweight:
        x = call.x + block.first * call.inner * item_size(kind)
        target = call.rows + block.place * strips_of(call.inner) * ROW
        read_rows(x, block.rows, call.inner, target, step, step, kind, kind)


@njit
def _go_back(call, unit, result, kind):
    """Fill a block of dx."""
    block = _block(call, unit)
    step = fill_up(block.rows) * ROW
    inner, outer = strips_of(call.inner), strips_of(call.outer)
    slopes = call.slopes + block.place * outer * ROW
    dx = call.dx + block.first * call.inner * item_size(kind)
    for strip in range(0, inner, WIDE):
        weights = call.packed + (block.group * inner + strip) * outer * LANES * ROW
        count = min(WIDE, inner - strip)
        multiply_block(slopes, step, outer, weights, count, result)
        write_rows(result, step, block.rows, count, dx, call.inner, strip * LANES, kind)


@njit
def _add_up(call, group, first, strip, result):
    """Fill a part of dW: `TALL` strips of its rows and `WIDE` of its columns, or those left."""
    inner, outer = strips_of(call.inner), strips_of(call.outer)
    tall, wide = min(TALL, outer - first), min(WIDE, inner - strip)
    begin, end = integers(call.bounds, call.groups + 1)[group : group + 2]
    if begin == end:
        sums = floats(result, tall * wide * LANES * LANES)
        for place in range(len(sums)):
            sums[place] = np.float32(0.0)
    for unit in range(begin, end):
        block = _block(call, unit)
        padded = fill_up(block.rows)
        slopes = call.slopes + (block.place * outer + first * padded) * ROW
        rows = call.rows + (block.place * inner + strip * padded) * ROW
        add_outer(slopes, rows, padded * ROW, tall, wide, result, unit == begin)
    rows = min(tall * LANES, call.outer - first * LANES)
    place = (group * call.outer + first * LANES) * call.inner
    write_rows(result, tall * LANES * ROW, rows, wide, call.dweight + place * 4, call.inner,
               strip * LANES, np.float32)  # fmt: skip


FIELDS = (
    "inner",
    "outer",
    "groups",
    "blocks",
    "filled",
    "table",
    "bounds",
    "wide",
    "x",
    "weight",
    "packed",
)
GRADIENTS = ("dy", "slopes", "rows", "dx", "dweight")
CALL = np.dtype(
    [
        (name, np.int64)
        for name in (*FIELDS, "y", *GRADIENTS, "next", "scratch", "scratch_size", "counter")
    ]
)
"""Sizes and addresses; `next` is of two numbers of units that are taken."""
KERNELS = (forward, backward)
