"""The products of `kernels` in 16-bit integers: numbers become blocks where they are read.

Forward, a unit is a block of rows with all columns of the result. Backward, it is a block of rows
again, with its gradient and its columns' integers, and then a part of a matrix's gradient with all
rows of its group, added up in their order. So no bit depends on the number of threads.
"""

from numba import njit

from nemotron.ops.grouped_linear.kernels import (
    CALL,
    block_of,
    clear,
    part_of,
    parts,
    pieces,
    read_block,
    read_piece,
    write_part,
)
from nemotron.ops.jit.barrier import take, wait
from nemotron.ops.jit.int16 import HALF_ROW
from nemotron.ops.jit.int16_matrices import (
    add_outer,
    column_size,
    multiply_block,
    multiply_block_to,
    part_size,
    rows_size,
    turn,
    write_column_block,
    write_columns_as_blocks,
    write_rows_as_blocks,
)
from nemotron.ops.jit.matrices import ROWS, WIDE, fill_up, strips_of, write_rows
from nemotron.ops.jit.scalars import integers, item_size, items
from nemotron.ops.jit.strips import ROW
from nemotron.ops.jit.vectors import LANES


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
    rows = scratch + depth * ROWS * ROW
    result = rows + rows_size(ROWS, depth)
    while call.blocks > 0:
        unit = take(call.next + 8)
        if unit >= call.blocks:
            break
        block = block_of(call, unit)
        padded = fill_up(block.rows)
        read_block(block, call.x, call.inner, scratch, kind)
        write_rows_as_blocks(scratch, padded * ROW, padded, depth, rows)
        weights = call.packed + block.group * strips * column_size(depth)
        multiply_rows(block, rows, depth, weights, call.y, call.outer, result, kind)
    wait(call.counter, threads)


@njit
def multiply_rows(block, a, depth, weights, y, columns, result, kind):
    """Write the product of a block, which lies at `a`, and weights as rows of y, in all columns."""
    padded, strips, begin = fill_up(block.rows), strips_of(columns), 0
    target = y + block.first * columns * item_size(kind)
    if padded == block.rows:
        begin = columns // LANES
        multiply_block_to(a, padded, depth, weights, begin, result, target, columns * 2)
    for strip in range(begin, strips, WIDE):
        count = min(WIDE, strips - strip)
        multiply_block(a, padded, depth, weights + strip * column_size(depth), count, result)
        write_rows(result, padded * ROW, block.rows, count, target, columns, strip * LANES, kind)


@njit
def read_transposed(call, weight, outer, inner, unit, scratch, packed, kind):
    """Write a piece of the matrices [groups, outer, inner] as strips of their transposes."""
    depth, rows = strips_of(inner), scratch + strips_of(inner) * ROWS * ROW
    group, piece = unit // pieces(outer), unit % pieces(outer)
    filled = read_piece(call, weight, outer, inner, unit, scratch, ROWS * ROW, kind)
    write_rows_as_blocks(scratch, ROWS * ROW, filled, depth, rows)
    place = group * strips_of(outer) + piece * ROWS // LANES
    turn(rows, filled, depth, packed + place * column_size(depth))


@njit
def read_straight(call, weight, outer, inner, unit, scratch, packed, kind):
    """Write a piece of the matrices [groups, outer, inner] as a block of each of their strips."""
    strips, size = strips_of(inner), column_size(strips_of(outer))
    group, piece = unit // pieces(outer), unit % pieces(outer)
    filled = read_piece(call, weight, outer, inner, unit, scratch, ROWS * ROW, kind)
    for strip in range(strips):
        column = packed + (group * strips + strip) * size
        write_column_block(scratch + strip * ROWS * ROW, filled, column, piece)


@njit(nogil=True, cache=True)
def backward(address, thread, threads, kind):
    """Fill dx = dy W and dW = dyᵀ x, float32, where they have an address."""
    call = items(address, 1, CALL)[0]
    scratch = call.scratch + thread * call.scratch_size
    inner, outer = strips_of(call.inner), strips_of(call.outer)
    units = call.groups * pieces(call.outer) if call.dx else 0
    while units > 0:
        unit = take(call.next)
        if unit >= units:
            break
        read_straight(call, call.weight, call.outer, call.inner, unit, scratch, call.packed, kind)
    wait(call.counter, threads)
    rows = scratch + max(inner, outer) * ROWS * ROW
    result = rows + rows_size(ROWS, outer)
    while call.blocks > 0:
        unit = take(call.next + 8)
        if unit >= call.blocks:
            break
        block = block_of(call, unit)
        padded = fill_up(block.rows)
        if call.dweight:
            read_block(block, call.x, call.inner, scratch, kind)
            write_columns_as_blocks(
                scratch, padded, inner, columns_of(call.rows, block, unit, inner)
            )
        read_block(block, call.dy, call.outer, scratch, kind)
        if call.dweight:
            write_columns_as_blocks(
                scratch, padded, outer, columns_of(call.slopes, block, unit, outer)
            )
        if call.dx:
            write_rows_as_blocks(scratch, padded * ROW, padded, outer, rows)
            weights = call.packed + block.group * inner * column_size(outer)
            multiply_rows(block, rows, outer, weights, call.dx, call.inner, result, kind)
    wait(call.counter, threads)
    units = call.groups * parts(call.outer, call.inner) if call.dweight else 0
    while units > 0:
        unit = take(call.next + 16)
        if unit >= units:
            break
        add_up(call, call.slopes, call.outer, call.rows, call.inner, unit, scratch, call.dweight)
    wait(call.counter, threads)


@njit
def columns_of(columns, block, number, strips):
    """Return where the strips of a block of rows lie, `number` being its place in the table."""
    return columns + (block.place * HALF_ROW + number * ROW) * strips


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
        size = part_size(padded)
        a = columns_of(slopes, block, number, strips_of(outer)) + part.top * size
        b = columns_of(rows, block, number, strips_of(inner)) + part.left * size
        add_outer(a, b, padded, part.tall, part.wide, result, number == begin)
    write_part(part, result, outer, inner, dweight)


KERNELS = (forward, backward)
