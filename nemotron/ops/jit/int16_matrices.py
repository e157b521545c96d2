"""Products of large matrices by the tiles of `int16`: strips become blocks of integers.

A matrix whose rows are added up is block after block of `DEPTH` strips; one whose columns are is
strip after strip, each with all blocks of `BLOCK` rows. Where columns are added up of rows that
have powers of two of their own, as those of keys in attention, the rows' factors come first, for
one block of strips after the other, and then strips of pairs without factors. Sizes are bytes, and
`padded` is a count of rows, filled up to a multiple of 8.
"""

from numba import njit

from nemotron.ops.jit.int16 import BLOCK, HALF_ROW, multiply, multiply_to, multiply_transposed
from nemotron.ops.jit.int16_blocks import pair_rows, quantize_columns, quantize_rows, transpose
from nemotron.ops.jit.lanes import load, splat, store
from nemotron.ops.jit.scalars import floats
from nemotron.ops.jit.strips import ROW
from nemotron.ops.jit.vectors import LANES

DEPTH = BLOCK // LANES
"""Strips of a block."""


@njit
def rows_size(padded, strips):
    """Return the size of rows of so many strips as blocks."""
    return -(-strips // DEPTH) * padded * 4 + strips * padded * HALF_ROW


@njit
def column_size(depth):
    """Return the size of a strip with rows for so many strips."""
    return -(-depth // DEPTH) * ROW + depth * LANES * HALF_ROW


@njit
def part_size(padded):
    """Return the size of a strip that is one block of so many rows."""
    return ROW + padded * HALF_ROW


@njit
def _block_of_rows(a, padded, number):
    return a + number * padded * (4 + DEPTH * HALF_ROW)


@njit
def _block_of_column(b, number):
    return b + number * (ROW + BLOCK * HALF_ROW)


@njit
def write_rows_as_blocks(source, step, padded, strips, target):
    """Write rows of float32 strips, `step` bytes apart, as blocks that are added up along rows."""
    for k in range(0, strips, DEPTH):
        place = _block_of_rows(target, padded, k // DEPTH)
        quantize_rows(source + k * step, step, padded, min(DEPTH, strips - k), place)


@njit
def write_column_block(source, padded, column, number):
    """Write rows of a float32 strip as one of the blocks of a strip that is added up downwards."""
    quantize_columns(source, padded // 2, _block_of_column(column, number))


@njit
def write_columns_as_blocks(source, padded, strips, target):
    """Write rows of float32 strips as a block of each strip, which is added up downwards."""
    for strip in range(strips):
        place = target + strip * part_size(padded)
        quantize_columns(source + strip * padded * ROW, padded // 2, place)


@njit
def turn(blocks, padded, strips, target):
    """Write the transpose of rows in blocks as strips that are added up downwards."""
    size = column_size(strips)
    for k in range(0, strips, DEPTH):
        block = _block_of_rows(blocks, padded, k // DEPTH)
        for row in range(0, padded, LANES):
            place = _block_of_column(target + row // LANES * size, k // DEPTH)
            store(place, load(block + row * 4))
            for strip in range(min(DEPTH, strips - k)):
                source = block + padded * 4 + (strip * padded + row) * HALF_ROW
                transpose(source, place + ROW + strip * LANES * HALF_ROW)


@njit
def scale_columns(columns, depth, strips, factor):
    """Multiply strips that are added up downwards by a factor."""
    for strip in range(strips):
        for number in range(-(-depth // DEPTH)):
            place = _block_of_column(columns + strip * column_size(depth), number)
            store(place, load(place) * splat(factor))


@njit
def added_size(padded, strips):
    """Return the size of rows with factors of their own, whose columns are added up."""
    return -(-strips // DEPTH) * padded * 4 + strips * (ROW + padded * HALF_ROW)


@njit
def factors_of(added, padded, number):
    """Return where the factors of such rows lie, for one block of strips."""
    return added + number * padded * 4


@njit
def strip_of(added, padded, strips, strip):
    """Return where a strip of such rows lies."""
    return added + -(-strips // DEPTH) * padded * 4 + strip * part_size(padded)


@njit
def write_added(blocks, padded, strips, target):
    """Write rows in blocks so that their columns can be added up."""
    for k in range(0, strips, DEPTH):
        block = _block_of_rows(blocks, padded, k // DEPTH)
        floats(factors_of(target, padded, k // DEPTH), padded)[:] = floats(block, padded)
        for strip in range(min(DEPTH, strips - k)):
            source = block + padded * 4 + strip * padded * HALF_ROW
            pair_rows(source, padded // 2, strip_of(target, padded, strips, k + strip))


@njit
def multiply_column(a, padded, count, depth, column, c):
    """Fill `count` rows of a float32 strip C = A B; A has `depth` strips of rows in blocks."""
    for k in range(0, depth, DEPTH):
        number = k // DEPTH
        multiply(_block_of_rows(a, padded, number), padded, count, min(DEPTH, depth - k),
                 _block_of_column(column, number), c, k == 0)  # fmt: skip


@njit
def multiply_block(a, padded, depth, b, strips, c):
    """Fill float32 strips of C = A B, where A has `depth` strips of rows in blocks."""
    for strip in range(strips):
        column, result = b + strip * column_size(depth), c + strip * padded * ROW
        multiply_column(a, padded, padded, depth, column, result)


@njit
def multiply_block_to(a, padded, depth, b, strips, c, y, between):
    """Write strips of A B as bfloat16 columns of rows that are `between` bytes apart; fill a C."""
    for strip in range(strips):
        column, place = b + strip * column_size(depth), y + strip * LANES * 2
        for k in range(0, depth - DEPTH, DEPTH):
            number = k // DEPTH
            multiply(_block_of_rows(a, padded, number), padded, padded, DEPTH,
                     _block_of_column(column, number), c, k == 0)  # fmt: skip
        last = (depth - 1) // DEPTH
        multiply_to(_block_of_rows(a, padded, last), padded, depth - last * DEPTH,
                    _block_of_column(column, last), c, last == 0, place, between)  # fmt: skip


@njit
def add_outer(a, b, padded, tall, strips, c, fresh):
    """C (+)= Aᵀ B: `tall` strips of A times `strips` of B, each a block of rows."""
    size = part_size(padded)
    for strip in range(strips):
        for row in range(tall):
            place = c + (strip * tall + row) * LANES * ROW
            multiply_transposed(a + row * size, b + strip * size, padded // 2, place, fresh)
