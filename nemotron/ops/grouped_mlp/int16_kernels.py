"""Rows through the experts in 16-bit integers: what `kernels` does, with products of blocks.

The activation and its gradient are computed in float32 in a core's cache, and become blocks there.
"""

from numba import njit

from nemotron.ops.grouped_linear.int16_kernels import (
    add_up,
    columns_of,
    multiply_rows,
    read_straight,
    read_transposed,
)
from nemotron.ops.grouped_linear.kernels import block_of, parts, pieces, read_block
from nemotron.ops.grouped_mlp.kernels import CALL, activate, differentiate
from nemotron.ops.jit.barrier import take, wait
from nemotron.ops.jit.int16_matrices import (
    column_size,
    multiply_block,
    rows_size,
    write_columns_as_blocks,
    write_rows_as_blocks,
)
from nemotron.ops.jit.matrices import ROWS, fill_up, strips_of
from nemotron.ops.jit.scalars import items
from nemotron.ops.jit.strips import ROW


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
    rows = scratch + max(inner, outer) * ROWS * ROW
    result = rows + rows_size(ROWS, max(inner, outer))
    while call.blocks > 0:
        unit = take(call.next + 8)
        if unit >= call.blocks:
            break
        block = block_of(call, unit)
        padded = fill_up(block.rows)
        read_block(block, call.x, call.inner, scratch, kind)
        write_rows_as_blocks(scratch, padded * ROW, padded, inner, rows)
        weights = call.ups + block.group * outer * column_size(inner)
        multiply_block(rows, padded, inner, weights, outer, scratch)
        activate(call, block, scratch, kind)
        write_rows_as_blocks(scratch, padded * ROW, padded, outer, rows)
        weights = call.downs + block.group * inner * column_size(outer)
        multiply_rows(block, rows, outer, weights, call.y, call.inner, result, kind)
    wait(call.counter, threads)


@njit(nogil=True, cache=True)
def backward(address, thread, threads, kind):
    """Fill dx, dup, ddown and the gradient of the weights, the latter three in float32."""
    call = items(address, 1, CALL)[0]
    scratch = call.scratch + thread * call.scratch_size
    ups = call.groups * pieces(call.outer) if call.dx else 0
    units = ups + call.groups * pieces(call.inner)
    while units > 0:
        unit = take(call.next)
        if unit >= units:
            break
        if unit < ups:
            read_straight(call, call.up, call.outer, call.inner, unit, scratch, call.ups, kind)
        else:
            read_straight(call, call.down, call.inner, call.outer, unit - ups, scratch,
                          call.downs, kind)  # fmt: skip
    wait(call.counter, threads)
    while call.blocks > 0:
        unit = take(call.next + 8)
        if unit >= call.blocks:
            break
        _go_back(call, unit, scratch, kind)
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
def _go_back(call, number, scratch, kind):
    """Go back through a block of rows, and write the columns of all that has rows."""
    block = block_of(call, number)
    inner, outer = strips_of(call.inner), strips_of(call.outer)
    padded = fill_up(block.rows)
    inside, activated = scratch, scratch + max(inner, outer) * ROWS * ROW
    rows = activated + max(inner, outer) * ROWS * ROW
    result = rows + rows_size(ROWS, max(inner, outer))
    if call.dup:
        read_block(block, call.x, call.inner, inside, kind)
        write_columns_as_blocks(inside, padded, inner, columns_of(call.rows, block, number, inner))
    read_block(block, call.dy, call.inner, activated, kind)
    if call.ddown:
        write_columns_as_blocks(
            activated, padded, inner, columns_of(call.slopes, block, number, inner)
        )
    write_rows_as_blocks(activated, padded * ROW, padded, inner, rows)
    weights = call.downs + block.group * outer * column_size(inner)
    multiply_block(rows, padded, inner, weights, outer, inside)
    differentiate(call, block, inside, activated, kind)
    if call.dup:
        write_columns_as_blocks(
            inside, padded, outer, columns_of(call.inside, block, number, outer)
        )
    if call.ddown:
        write_columns_as_blocks(
            activated, padded, outer, columns_of(call.activated, block, number, outer)
        )
    if call.dx:
        write_rows_as_blocks(inside, padded * ROW, padded, outer, rows)
        weights = call.ups + block.group * inner * column_size(outer)
        multiply_rows(block, rows, outer, weights, call.dx, call.inner, result, kind)


KERNELS = (forward, backward)
