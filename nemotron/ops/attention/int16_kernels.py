"""Causal attention in 16-bit integers: what `kernels` does, with products of blocks.

Up to 64 channels of a query, key, value or gradient of y share a power of two. Where keys or
columns are added up, the probabilities are multiplied by the powers of two of what they weigh, and
become integers by the largest of these products. So no digit of a query's result depends on keys
that it does not see. Scores, probabilities and sums are float32.
"""

import numpy as np
from numba import njit

from nemotron.ops.attention.columns_kernels import (
    CALL,
    LOG2_E,
    add_parts,
    bounds,
    copy_columns,
    fill,
    hide_unseen,
    inner_products,
    int32s,
    last_key,
    move,
    read_dy,
    read_k,
    read_q,
    read_v,
    scale,
    seen_keys,
    write_keys,
    write_y,
)
from nemotron.ops.attention.kernels import COLUMNS, KEYS
from nemotron.ops.jit.barrier import take, wait
from nemotron.ops.jit.int16 import multiply, multiply_transposed
from nemotron.ops.jit.int16_blocks import quantize_columns_times, quantize_rows_times
from nemotron.ops.jit.int16_matrices import (
    DEPTH,
    added_size,
    column_size,
    factors_of,
    multiply_column,
    part_size,
    rows_size,
    scale_columns,
    strip_of,
    turn,
    write_added,
    write_rows_as_blocks,
)
from nemotron.ops.jit.matrices import fill_up
from nemotron.ops.jit.scalars import items, share
from nemotron.ops.jit.softmax import LOWEST, advance, retreat
from nemotron.ops.jit.strips import ROW
from nemotron.ops.jit.vectors import LANES

TOGETHER = 4
"""Strips of queries whose sums for keys and values are taken together: a block of integers."""
MANY = 16
"""Turns after which these sums are added to those of all: long sums lose digits."""


@njit(nogil=True, cache=True)
def forward(address, thread, threads, kind):
    """Fill y, float32, and for each column its highest score and the sum of powers."""
    call = items(address, 1, CALL)[0]
    scratch = call.scratch + thread * call.scratch_size
    sides = call.sides
    first, last = share(sides * call.blocks, thread, threads)
    for unit in range(first, last):
        _read_block(call, unit // call.blocks, unit % call.blocks, scratch, kind)
    wait(call.counter, threads)
    blocks = -(-call.columns // COLUMNS)
    units = blocks * sides
    while units > 0:
        unit = take(call.next)
        if unit >= units:
            break
        block = blocks - 1 - unit // sides  # late ones see most: they are begun first
        _forward(call, unit % sides, block * COLUMNS, scratch, kind)
    wait(call.counter, threads)


@njit
def _read_block(call, side, block, scratch, kind):
    """Write a block of keys, whose channels are added up, and one of values, which are."""
    channels, number = call.depth // LANES, side * call.blocks + block
    begin = block * KEYS
    end = min(begin + KEYS, last_key(call, side) + 1)
    read_k(call, side, begin, end, KEYS, scratch, KEYS * ROW, kind)
    keys = call.keys + number * rows_size(KEYS, channels)
    write_rows_as_blocks(scratch, KEYS * ROW, KEYS, channels, keys)
    read_v(call, side, begin, end, KEYS, scratch, KEYS * ROW, kind)
    rows = scratch + KEYS * channels * ROW
    write_rows_as_blocks(scratch, KEYS * ROW, KEYS, channels, rows)
    write_added(rows, KEYS, channels, call.values + number * added_size(KEYS, channels))


@njit
def _forward(call, side, begin, scratch, kind):
    channels = call.depth // LANES
    size, tall = call.depth * ROW, column_size(channels)
    strips = -(-min(COLUMNS, call.columns - begin) // LANES)
    scores = scratch
    powers = scores + KEYS * ROW
    queries = powers + part_size(KEYS)
    sums = queries + COLUMNS // LANES * tall
    some = sums + COLUMNS // LANES * size
    tops = some + size
    totals = tops + COLUMNS * 4
    lows = totals + COLUMNS * 4
    highs = lows + COLUMNS * 4
    for strip in range(strips):
        first = begin + strip * LANES
        read_q(call, side, first, some, ROW * LANES, np.float32(1.0), kind)
        write_rows_as_blocks(some, ROW * LANES, LANES, channels, sums)
        turn(sums, LANES, channels, queries + strip * tall)
        bounds(call, side, first, lows + strip * ROW, highs + strip * ROW)
    scale_columns(queries, channels, strips, scale(call) * LOG2_E)
    fill(sums, strips * LANES * call.depth, np.float32(0.0))
    fill(tops, COLUMNS, np.float32(LOWEST))
    fill(totals, COLUMNS, np.float32(0.0))
    low, high = int32s(lows, COLUMNS), int32s(highs, COLUMNS)
    for block in range(low[0] // KEYS, high[strips * LANES - 1] // KEYS + 1):
        key, number = block * KEYS, side * call.blocks + block
        keys = call.keys + number * rows_size(KEYS, channels)
        values = call.values + number * added_size(KEYS, channels)
        for strip in range(strips):
            end = min(high[strip * LANES + LANES - 1] + 1, key + KEYS)
            if end <= max(low[strip * LANES], key):
                continue
            count, more, place = fill_up(end - key), strip * ROW, sums + strip * size
            multiply_column(keys, KEYS, count, channels, queries + strip * tall, scores)
            hide_unseen(scores, count, np.float32(LOWEST), lows + more, highs + more, key)
            advance(scores, count, tops + more, totals + more, place, call.depth)
            hide_unseen(scores, count, np.float32(0.0), lows + more, highs + more, key)
            _add_up(values, channels, scores, count, powers, place, False)
    write_y(call, side, begin, strips, sums, tops, totals, some)


@njit
def _add_up(rows, channels, weights, count, some, target, fresh):
    """Add up keys or values, each column with its weights, in strips of columns."""
    for number in range(-(-channels // DEPTH)):
        quantize_columns_times(weights, count // 2, factors_of(rows, KEYS, number), some)
        for channel in range(number * DEPTH, min((number + 1) * DEPTH, channels)):
            strip = strip_of(rows, KEYS, channels, channel)
            multiply_transposed(strip, some, count // 2, target + channel * LANES * ROW, fresh)


@njit(nogil=True, cache=True)
def backward(address, thread, threads, kind):
    """Fill dq, dk and dv; `logs` are of the sums of powers, `inner` becomes dy · y."""
    call = items(address, 1, CALL)[0]
    scratch = call.scratch + thread * call.scratch_size
    first, last = share(call.sides * call.strips, thread, threads)
    for unit in range(first, last):
        inner_products(call, unit // call.strips, unit % call.strips * LANES, scratch, kind)
    wait(call.counter, threads)
    units = call.segments * call.sides
    while units > 0:
        unit = take(call.next)
        if unit >= units:
            break
        _segment(call, unit % call.sides, unit // call.sides, scratch, kind)
    wait(call.counter, threads)
    turns = -(-call.strips // TOGETHER)
    first, last = share(call.sides * turns, thread, threads)
    for unit in range(first, last):
        add_parts(call, unit // turns, unit % turns * TOGETHER, TOGETHER, scratch, kind)
    wait(call.counter, threads)


@njit
def _segment(call, side, segment, scratch, kind):
    """Fill dk and dv of a segment, and its part of dq for the columns that see it."""
    channels, columns = call.depth // LANES, TOGETHER * LANES
    size, wide, tall = call.depth * ROW, call.segment * call.depth * 4, column_size(channels)
    straight, added = rows_size(KEYS, channels), added_size(KEYS, channels)
    blocks = call.segment // KEYS
    keys = scratch
    values = keys + blocks * straight
    keys_added = values + blocks * straight
    dk = keys_added + blocks * added
    dv = dk + wide
    sums = dv + wide  # of dk and dv
    powers = sums + 2 * wide
    slopes = powers + TOGETHER * KEYS * ROW
    some = slopes + TOGETHER * KEYS * ROW
    numbers = some + rows_size(KEYS, max(TOGETHER, channels))
    q_added = numbers + columns * call.depth * 4
    dy_added = q_added + added_size(columns, channels)
    q = dy_added + added_size(columns, channels)
    dy = q + TOGETHER * tall
    logs = dy + TOGETHER * tall
    inner = logs + TOGETHER * ROW
    lows = inner + TOGETHER * ROW
    highs = lows + TOGETHER * ROW
    begin = segment * call.segment
    end = min(begin + call.segment, call.total)
    stop = min(end, last_key(call, side) + 1)
    for block in range(blocks):
        key = begin + block * KEYS
        read_k(call, side, key, stop, KEYS, dk, KEYS * ROW, kind)
        write_rows_as_blocks(dk, KEYS * ROW, KEYS, channels, keys + block * straight)
        write_added(keys + block * straight, KEYS, channels, keys_added + block * added)
        read_v(call, side, key, stop, KEYS, dk, KEYS * ROW, kind)
        write_rows_as_blocks(dk, KEYS * ROW, KEYS, channels, values + block * straight)
    fill(dk, 4 * call.segment * call.depth, np.float32(0.0))  # and what is behind it
    turns = 0
    for first in range(0, call.strips, TOGETHER):
        start, finish = seen_keys(call, side, first, TOGETHER, begin, stop)
        if start >= finish:
            continue
        part = call.parts + ((segment * call.sides + side) * call.strips + first) * size
        strips = min(TOGETHER, call.strips - first)
        for strip in range(strips):
            column, more = (first + strip) * LANES, strip * ROW
            bounds(call, side, column, lows + more, highs + more)
            copy_columns(call, call.logs, side, column, logs + more)
            copy_columns(call, call.inner, side, column, inner + more)
        for strip in range(TOGETHER):
            read_q(call, side, (first + strip) * LANES, numbers + strip * LANES * ROW,
                   columns * ROW, np.float32(1.0), kind)  # fmt: skip
        _write_both(numbers, channels, some, q, q_added)
        scale_columns(q, channels, TOGETHER, scale(call) * LOG2_E)
        for strip in range(TOGETHER):
            read_dy(call, side, (first + strip) * LANES, numbers + strip * LANES * ROW,
                    columns * ROW, kind)  # fmt: skip
        _write_both(numbers, channels, some, dy, dy_added)
        is_first = True
        for block in range((start - begin) // KEYS, (finish - 1 - begin) // KEYS + 1):
            key = begin + block * KEYS
            count = fill_up(min(finish - key, KEYS))
            k, v = keys + block * straight, values + block * straight
            for strip in range(strips):
                p, g, more = powers + strip * KEYS * ROW, slopes + strip * KEYS * ROW, strip * ROW
                multiply_column(k, KEYS, count, channels, q + strip * tall, p)
                multiply_column(v, KEYS, count, channels, dy + strip * tall, g)
                retreat(p, g, count, logs + more, inner + more)
                for both in (p, g):
                    hide_unseen(both, count, np.float32(0.0), lows + more, highs + more, key)
                _add_up(keys_added + block * added, channels, g, count, some, part + strip * size,
                        is_first)  # fmt: skip
            is_first = False
            offset = block * KEYS * ROW
            _add_columns(dy_added, channels, powers, count, strips, some, dv + offset, call.segment)
            _add_columns(q_added, channels, slopes, count, strips, some, dk + offset, call.segment)
        turns += 1
        if turns % MANY == 0:
            move(dk, sums, 2 * call.segment * call.depth)
    move(dk, sums, 2 * call.segment * call.depth)
    write_keys(call, call.dk, side, begin, end, sums, scale(call), kind)
    write_keys(call, call.dv, side, begin, end, sums + wide, np.float32(1.0), kind)


@njit
def _write_both(numbers, channels, some, straight, added):
    """Write columns whose channels are added up, and again to be added up themselves."""
    columns = TOGETHER * LANES
    write_rows_as_blocks(numbers, columns * ROW, columns, channels, some)
    turn(some, columns, channels, straight)
    write_added(some, columns, channels, added)


@njit
def _add_columns(columns, channels, weights, count, strips, some, target, room):
    """Add up columns, each key with its weights, in strips of so many keys."""
    for number in range(-(-channels // DEPTH)):
        factors = factors_of(columns, TOGETHER * LANES, number)
        quantize_rows_times(weights, KEYS * ROW, count, strips, factors, some)
        for channel in range(number * DEPTH, min((number + 1) * DEPTH, channels)):
            strip = strip_of(columns, TOGETHER * LANES, channels, channel)
            multiply(some, count, count, strips, strip, target + channel * room * ROW, False)


KERNELS = (forward, backward)
