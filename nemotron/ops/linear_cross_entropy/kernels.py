"""Summed cross entropy and its gradient: for a block of rows, logits to slopes without a pause.

A unit is a block of rows: its logits are written as strips, become slopes there, and those are
multiplied by the weight. After some blocks, whose slopes exist together, their part is added to the
weight's gradient: a unit is then a part of that, which adds up all rows in their order. So no bit
depends on the number of threads, nor on how many blocks exist together. Sums over the vocabulary
are those of `DEPTH` strips each, which are added up: long ones keep their digits.
"""

import math

import numpy as np
from numba import njit

from nemotron.ops.grouped_linear.kernels import (
    block_of,
    parts,
    pieces,
    read_block,
    read_straight,
    read_transposed,
)
from nemotron.ops.jit.barrier import take, wait
from nemotron.ops.jit.lanes import load, store
from nemotron.ops.jit.matrices import (
    DEPTH,
    ROWS,
    TALL,
    WIDE,
    add_outer,
    fill_up,
    multiply_block,
    read_columns,
    strips_of,
    write_rows,
)
from nemotron.ops.jit.scalars import doubles, floats, integers, items
from nemotron.ops.jit.softmax import exponentiate, raise_tops
from nemotron.ops.jit.strips import ROW, multiply
from nemotron.ops.jit.vectors import LANES


@njit(nogil=True, cache=True)
def compute_loss(address, thread, threads, kind):
    """Fill the summed loss, and its gradients dx and dW, float32, where they have an address."""
    call = items(address, 1, CALL)[0]
    scratch = call.scratch + thread * call.scratch_size
    matrices = pieces(call.vocab)
    units = matrices * (2 if call.dx else 1)
    while units > 0:
        unit = take(call.next)
        if unit >= units:
            break
        if unit < matrices:
            read_transposed(call, call.weight, call.vocab, call.inner, unit, scratch,
                            call.transposed, kind)  # fmt: skip
        else:
            read_straight(call, call.weight, call.vocab, call.inner, unit - matrices,
                          call.straight, kind)  # fmt: skip
    wait(call.counter, threads)
    counter = call.next
    for first in range(0, call.blocks, max(1, call.together)):
        blocks = min(call.together, call.blocks - first)
        counter += 8
        while True:
            unit = take(counter)
            if unit >= blocks:
                break
            _go_through(call, first, first + unit, scratch, kind)
        wait(call.counter, threads)
        if call.dweight:
            counter += 8
            units = parts(call.vocab, call.inner)
            while True:
                unit = take(counter)
                if unit >= units:
                    break
                _add_up(call, first, blocks, unit, scratch)
            wait(call.counter, threads)
    if thread == 0 and call.blocks > 0:
        total = 0.0
        losses = doubles(call.losses, call.count)
        for row in range(call.count):
            total += losses[row]
        floats(call.loss, 1)[0] = total


@njit
def _places(call, first, number):
    """Return where the slopes and the rows of a block lie, `first` being the first with others."""
    place = block_of(call, number).place - block_of(call, first).place
    slopes = call.slopes + place * strips_of(call.vocab) * ROW
    return slopes, call.rows + place * strips_of(call.inner) * ROW


@njit
def _go_through(call, first, number, scratch, kind):
    """Fill the losses of a block of rows, their slopes, and their part of dx."""
    block = block_of(call, number)
    inner, strips = strips_of(call.inner), strips_of(call.vocab)
    padded = fill_up(block.rows)
    step = padded * ROW
    slopes, rows = _places(call, first, number)
    read_block(block, call.x, call.inner, rows, kind)
    tops, sums = scratch, scratch + ROWS * ROW
    part, result = scratch + 2 * ROWS * ROW, scratch + 3 * ROWS * ROW
    _fill(tops, padded, np.float32(-np.inf))
    for strip in range(strips):
        weights, place = call.transposed + strip * inner * LANES * ROW, slopes + strip * step
        multiply_block(rows, step, inner, weights, 1, place)
        if strip == strips - 1:
            _hide(place, padded, call.vocab - strip * LANES)
        raise_tops(place, tops, padded)
    for row in range(padded):
        top = floats(tops + row * ROW, LANES)
        top[:] = top.max()
    _fill(sums, padded, np.float32(0.0))
    labels = integers(call.labels + block.first * 8, block.rows)
    losses = doubles(call.losses + block.first * 8, block.rows)
    for row in range(block.rows):
        logit = floats(_label(slopes, step, row, labels[row]), 1)[0]
        losses[row] = np.float64(floats(tops + row * ROW, 1)[0]) - np.float64(logit)
    for k in range(0, strips, DEPTH):
        _fill(part, padded, np.float32(0.0))
        for strip in range(k, min(k + DEPTH, strips)):
            exponentiate(slopes + strip * step, tops, part, padded)
        _add(part, sums, padded)
    for row in range(padded):
        lanes, total, factor = floats(sums + row * ROW, LANES), 0.0, np.float32(0.0)
        if row < block.rows:
            for lane in range(LANES):
                total += np.float64(lanes[lane])
            share = _share(call, block, row)
            losses[row] = (losses[row] + math.log(total)) * share
            factor = np.float32(share / total)
        lanes[:] = factor
    if call.dx or call.dweight:
        _go_back(call, block, slopes, sums, labels, part, result)


@njit
def _fill(target, rows, value):
    x = floats(target, rows * LANES)
    for place in range(len(x)):
        x[place] = value


@njit
def _add(source, target, rows):
    """Add the rows of a strip to those of another."""
    for at in range(0, rows * ROW, ROW):
        store(target + at, load(target + at) + load(source + at))


@njit
def _hide(strip, rows, columns):
    """Take the columns behind the vocabulary out of the softmax."""
    for row in range(rows):
        x = floats(strip + row * ROW, LANES)
        for lane in range(columns, LANES):
            x[lane] = np.float32(-np.inf)


@njit
def _label(slopes, step, row, label):
    """Return the address of the number of a row's label."""
    return slopes + label // LANES * step + row * ROW + label % LANES * 4


@njit
def _share(call, block, row):
    """Return the weight of a row's loss."""
    if call.shares == 0:
        return np.float32(1.0)
    return floats(call.shares + block.first * 4, block.rows)[row]


@njit
def _go_back(call, block, slopes, factors, labels, part, result):
    """Turn a block's powers into slopes, and fill its rows of dx."""
    inner, strips = strips_of(call.inner), strips_of(call.vocab)
    padded = fill_up(block.rows)
    step = padded * ROW
    _fill(result, inner * padded, np.float32(0.0))
    for k in range(0, strips, DEPTH):
        count, piece = min(DEPTH, strips - k), slopes + k * step
        for strip in range(count):
            for at in range(0, step, ROW):
                place = piece + strip * step + at
                store(place, load(place) * load(factors + at))
        for row in range(block.rows):
            if k <= labels[row] // LANES < k + count:
                slope = floats(_label(slopes, step, row, labels[row]), 1)
                slope[0] -= _share(call, block, row)
        if call.dx == 0:
            continue
        for strip in range(inner):
            weights = call.straight + (strip * strips + k) * LANES * ROW
            multiply(piece, step, count, weights, part, padded, True)
            _add(part, result + strip * step, padded)
    if call.dx:
        target = call.dx + block.first * call.inner * 4
        write_rows(result, step, block.rows, inner, target, call.inner, 0, np.float32)


@njit
def _add_up(call, first, blocks, unit, result):
    """Add what some blocks give to a part of dW: `TALL` strips of rows, `WIDE` of columns."""
    inner, strips = strips_of(call.inner), strips_of(call.vocab)
    across = -(-inner // WIDE)
    top, left = unit // across * TALL, unit % across * WIDE
    tall, wide = min(TALL, strips - top), min(WIDE, inner - left)
    count, step = min(tall * LANES, call.vocab - top * LANES), tall * LANES * ROW
    target = call.dweight + top * LANES * call.inner * 4
    if first > 0:
        read_columns(target, call.inner, left * LANES, count, wide, result, step)
    for number in range(first, first + blocks):
        padded = fill_up(block_of(call, number).rows)
        slopes, rows = _places(call, first, number)
        a, b = slopes + top * padded * ROW, rows + left * padded * ROW
        add_outer(a, b, padded * ROW, tall, wide, result, number == 0)
    write_rows(result, step, count, wide, target, call.inner, left * LANES, np.float32)


FIELDS = ("inner", "vocab", "groups", "blocks", "table", "bounds", "wide", "next", "together")
TENSORS = ("x", "weight", "labels", "shares", "count", "transposed", "straight", "slopes", "rows")
RESULTS = ("losses", "loss", "dx", "dweight", "scratch", "scratch_size", "counter")
CALL = np.dtype([(name, np.int64) for name in (*FIELDS, *TENSORS, *RESULTS)])
"""Sizes and addresses; `next` is of numbers of units that are taken."""
KERNELS = (compute_loss,)
