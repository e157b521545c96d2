"""Products of rows by the matrices of their groups, and their gradients, in blocks of rows.

Forward, a unit is a block of rows with all columns of the result. Backward, blocks of rows and of
their gradients are written as strips first; then a unit is a block of the rows' gradient, or a
part of a matrix's gradient with all rows of its group, added up in their order. So no bit depends
on the number of threads. Weights that are float32 beside rows in bfloat16 are rounded when read.
"""

from typing import NamedTuple

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
from nemotron.ops.jit.scalars import _pointer, floats, integers, item_size, items
from nemotron.ops.jit.strips import ROW
from nemotron.ops.jit.vectors import LANES

BLOCK = np.dtype([(name, np.int64) for name in ("group", "first", "rows", "place")])
"""A block of rows of a group: the first one, how many, and how many are before it, filled up."""


@njit(nogil=True, cache=True)
def forward(address, thread, threads, kind):
    """Fill y: the rows of each group times the transpose of its matrix."""
    call = items(address, 1, CALL)[0]
    scratch = call.scratch + thread * call.scratch_size
    depth, strips = strips_of(call.inner), strips_of(call.outer)
    units = call.groups * pieces(call.outer)
    while units > 0:
        unit = take(call.next)
        if unit >= units:
            break
        read_transposed(call, call.weight, call.outer, call.inner, unit, scratch, call.packed, kind)
    wait(call.counter, threads)
    result = scratch + depth * ROWS * ROW
    while call.blocks > 0:
        unit = take(call.next + 8)
        if unit >= call.blocks:
            break
        block = block_of(call, unit)
        read_block(block, call.x, call.inner, scratch, kind)
        weights = call.packed + block.group * strips * depth * LANES * ROW
        multiply_rows(block, scratch, depth, weights, call.y, call.outer, result, kind)
    wait(call.counter, threads)


@njit
def block_of(call, number):
    """Return a block of the table."""
    return carray(_pointer(call.table), (call.blocks,), BLOCK)[number]


@njit
def pieces(outer):
    """Return in how many pieces a matrix with so many rows is read."""
    return -(-outer // ROWS)


@njit
def multiply_rows(block, a, depth, weights, y, columns, result, kind):
    """Write the product of a block, which lies at `a`, and weights as rows of y, in all columns."""
    step = fill_up(block.rows) * ROW
    target = y + block.first * columns * item_size(kind)
    strips = strips_of(columns)
    for strip in range(0, strips, WIDE):
        count = min(WIDE, strips - strip)
        multiply_block(a, step, depth, weights + strip * depth * LANES * ROW, count, result)
        write_rows(result, step, block.rows, count, target, columns, strip * LANES, kind)


@njit
def read_transposed(call, weight, outer, inner, unit, scratch, packed, kind):
    """Write a piece of the matrices [groups, outer, inner] as strips of their transposes."""
    depth = strips_of(inner)
    group, piece = unit // pieces(outer), unit % pieces(outer)
    filled = read_piece(call, weight, outer, inner, unit, scratch, ROWS * ROW, kind)
    place = group * strips_of(outer) + piece * ROWS // LANES
    turn(scratch, filled, ROWS * ROW, depth, packed + place * depth * LANES * ROW)


@njit
def read_straight(call, weight, outer, inner, unit, packed, kind):
    """Write a piece of the matrices [groups, outer, inner] as strips."""
    step = strips_of(outer) * LANES * ROW
    group, piece = unit // pieces(outer), unit % pieces(outer)
    target = packed + group * strips_of(inner) * step + piece * ROWS * ROW
    read_piece(call, weight, outer, inner, unit, target, step, kind)


@njit
def read_piece(call, weight, outer, inner, unit, target, step, kind):
    """Write a piece as strips, and return how many rows it has when they are filled up."""
    group, first = unit // pieces(outer), unit % pieces(outer) * ROWS
    rows = min(ROWS, outer - first)
    filled = strips_of(rows) * LANES
    place = (group * outer + first) * inner
    if call.wide:
        source = weight + place * 4
        read_rows(source, rows, inner, target, filled * ROW, step, np.float32, kind)
    else:
        source = weight + place * item_size(kind)
        read_rows(source, rows, inner, target, filled * ROW, step, kind, kind)
    return filled


@njit(nogil=True, cache=True)
def backward(address, thread, threads, kind):
    """Fill dx = dy W and dW = dyᵀ x, float32, where they have an address."""
    call = items(address, 1, CALL)[0]
    scratch = call.scratch + thread * call.scratch_size
    inner, outer = strips_of(call.inner), strips_of(call.outer)
    matrices = call.groups * pieces(call.outer) if call.dx else 0
    while matrices + call.blocks > 0:
        unit = take(call.next)
        if unit >= matrices + call.blocks:
            break
        if unit < matrices:
            read_straight(call, call.weight, call.outer, call.inner, unit, call.packed, kind)
            continue
        block = block_of(call, unit - matrices)
        read_block(block, call.dy, call.outer, call.slopes + block.place * outer * ROW, kind)
        if call.dweight:
            read_block(block, call.x, call.inner, call.rows + block.place * inner * ROW, kind)
    wait(call.counter, threads)
    matrices = call.groups * parts(call.outer, call.inner) if call.dweight else 0
    blocks = call.blocks if call.dx else 0
    while matrices + blocks > 0:
        unit = take(call.next + 8)
        if unit >= matrices + blocks:
            break
        if unit < matrices:
            add_up(call, call.slopes, call.outer, call.rows, call.inner, unit, scratch,
                   call.dweight)  # fmt: skip
            continue
        block = block_of(call, unit - matrices)
        slopes = call.slopes + block.place * outer * ROW
        weights = call.packed + block.group * inner * outer * LANES * ROW
        multiply_rows(block, slopes, outer, weights, call.dx, call.inner, scratch, kind)
    wait(call.counter, threads)


@njit
def read_block(block, x, columns, target, kind):
    """Write the rows of a block as strips."""
    step = fill_up(block.rows) * ROW
    source = x + block.first * columns * item_size(kind)
    read_rows(source, block.rows, columns, target, step, step, kind, kind)


class Part(NamedTuple):
    """A part of a matrix's gradient: its group, and strips of rows and of columns."""

    group: int
    top: int
    tall: int
    left: int
    wide: int


@njit
def parts(outer, inner):
    """Return in how many parts the gradient of a matrix is added up."""
    return -(-strips_of(outer) // TALL) * -(-strips_of(inner) // WIDE)


@njit
def part_of(outer, inner, unit):
    """Return a part: `TALL` strips of rows, `WIDE` of columns, or what is left."""
    across = -(-strips_of(inner) // WIDE)
    group, number = unit // parts(outer, inner), unit % parts(outer, inner)
    top, left = number // across * TALL, number % across * WIDE
    tall, wide = min(TALL, strips_of(outer) - top), min(WIDE, strips_of(inner) - left)
    return Part(group, top, tall, left, wide)


@njit
def clear(part, result):
    """Write zeros: the gradient of a matrix without rows."""
    sums = floats(result, part.tall * part.wide * LANES * LANES)
    for place in range(len(sums)):
        sums[place] = np.float32(0.0)


@njit
def write_part(part, result, outer, inner, dweight):
    """Write strips of a part as rows of the gradient."""
    count = min(part.tall * LANES, outer - part.top * LANES)
    target = dweight + (part.group * outer + part.top * LANES) * inner * 4
    step = part.tall * LANES * ROW
    write_rows(result, step, count, part.wide, target, inner, part.left * LANES, np.float32)


@njit
def add_up(call, slopes, outer, rows, inner, unit, result, dweight):
    """Fill a part of dW, the sum of slopesᵀ rows."""
    part = part_of(outer, inner, unit)
    begin, end = integers(call.bounds, call.groups + 1)[part.group : part.group + 2]
    if begin == end:
        clear(part, result)
    for number in range(begin, end):
        block = block_of(call, number)
        padded = fill_up(block.rows)
        a = slopes + (block.place * strips_of(outer) + part.top * padded) * ROW
        b = rows + (block.place * strips_of(inner) + part.left * padded) * ROW
        add_outer(a, b, padded * ROW, part.tall, part.wide, result, number == begin)
    write_part(part, result, outer, inner, dweight)


FIELDS = ("inner", "outer", "groups", "blocks", "table", "bounds", "wide", "next")
TENSORS = ("x", "weight", "packed", "y", "dy", "slopes", "rows", "dx", "dweight")
CALL = np.dtype(
    [(name, np.int64) for name in (*FIELDS, *TENSORS, "scratch", "scratch_size", "counter")]
)
"""Sizes and addresses; `next` is of numbers of units that are taken."""
KERNELS = (forward, backward)
