"""Products of large matrices by the tiles of `strips`: blocks of rows, written as strips and back.

A matrix in memory is row after row, in float32 or bfloat16; a block is some of its rows as float32
strips [columns / 16, rows, 16], with zeros where rows or columns are filled up. Addresses and sizes
are those of `strips`; `padded` is a count of rows, filled up to a multiple of 8.
"""

import numpy as np
from numba import njit

from nemotron.ops.jit.lanes import load, read, rounded, store, write
from nemotron.ops.jit.scalars import decode, encode, floats, item_size, items
from nemotron.ops.jit.strips import ROW, multiply, multiply_transposed, transpose
from nemotron.ops.jit.vectors import LANES

ROWS = 64
"""Rows of a block: those of 256 columns fill a sixteenth of a core's second cache."""
DEPTH = 16
"""Strips of an inner dimension after which the next rows come: 256 rows of a strip fill half of
the first cache."""
WIDE = 16
"""Strips of a result that are written together."""
TALL = 8
"""Strips of rows of a weight's gradient that are added up together."""


@njit
def fill_up(rows):
    """Return a count of rows, filled up to what products take."""
    return -(-rows // 8) * 8


@njit
def strips_of(columns):
    """Return the strips that hold so many columns."""
    return -(-columns // LANES)


@njit
def _read(source, count, target, given, kind):
    """Write a row of a strip of which a matrix has only `count` numbers; the others are 0."""
    x, y = items(source, count, given), floats(target, LANES)
    for lane in range(LANES):
        y[lane] = decode(encode(decode(x[lane]), kind)) if lane < count else np.float32(0.0)


@njit
def read_rows(source, rows, columns, target, filled, step, given, kind):
    """Write rows of a matrix in the format `given` as strips, rounded to the format `kind`.

    Strips begin `step` bytes from each other, of which `filled` are written, at last zeros.
    """
    size, left = item_size(given), columns % LANES
    for row in range(rows):
        begin, place = source + row * columns * size, target + row * ROW
        for strip in range(columns // LANES):
            numbers = read(begin + strip * LANES * size, given)
            store(place + strip * step, rounded(numbers, given, kind))
        if left:
            whole = columns // LANES
            _read(begin + whole * LANES * size, left, place + whole * step, given, kind)
    for strip in range(strips_of(columns)):
        y = floats(target + strip * step + rows * ROW, filled // 4 - rows * LANES)
        for place in range(len(y)):
            y[place] = np.float32(0.0)


@njit
def write_rows(source, step, rows, strips, target, columns, first, kind):
    """Write strips as the columns from `first` on of rows of a matrix with so many columns."""
    size = item_size(kind)
    for row in range(rows):
        begin, place = source + row * ROW, target + row * columns * size
        for strip in range(strips):
            column = first + strip * LANES
            if column + LANES <= columns:
                write(place + column * size, load(begin + strip * step), kind)
            else:
                count = columns - column
                x, y = (
                    floats(begin + strip * step, count),
                    items(place + column * size, count, kind),
                )
                for lane in range(count):
                    y[lane] = encode(x[lane], kind)


@njit
def read_columns(source, columns, first, rows, strips, target, step):
    """Write columns of rows of a float32 matrix as strips: the inverse of `write_rows`."""
    for row in range(rows):
        begin, place = source + row * columns * 4, target + row * ROW
        for strip in range(strips):
            column = first + strip * LANES
            if column + LANES <= columns:
                store(place + strip * step, load(begin + column * 4))
            else:
                left = columns - column
                _read(begin + column * 4, left, place + strip * step, np.float32, np.float32)


@njit
def turn(source, rows, step, strips, target):
    """Write the transpose of rows of strips, `step` bytes apart; `rows` is a multiple of 16."""
    for strip in range(strips):
        for row in range(0, rows, LANES):
            place = (row // LANES * strips + strip) * LANES * ROW
            transpose(source + strip * step + row * ROW, target + place)


@njit
def multiply_block(a, step, depth, b, strips, c):
    """Fill strips of C = A B, `step` bytes each like those of A, of which there are `depth`.

    B has the `depth` strips' columns as rows.
    """
    for strip in range(strips):
        weights, result = b + strip * depth * LANES * ROW, c + strip * step
        for k in range(0, depth, DEPTH):
            multiply(a + k * step, step, min(DEPTH, depth - k), weights + k * LANES * ROW, result,
                     step // ROW, k == 0)  # fmt: skip


@njit
def add_outer(a, b, step, tall, strips, c, fresh):
    """C (+)= Aᵀ B: `tall` strips of A times `strips` of B, each of `step` bytes."""
    for strip in range(strips):
        result = c + strip * tall * LANES * ROW
        multiply_transposed(a, step, tall, b + strip * step, step // ROW, result, fresh)
