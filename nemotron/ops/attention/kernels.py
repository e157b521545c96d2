"""Causal attention in blocks that stay in a core's cache; the gradient recomputes probabilities.

The queries of a key-value head are columns, token by token and head by head within it; sixteen of
them are the lanes of a vector, and what has a number for each query and channel lies in strips
[columns / 16, channels, 16]. Keys, values and what is summed up for them lie in strips of sixteen
channels, [channels / 16, keys, 16]. Blocks that no query of a strip sees are passed over.

Forward, a unit is a block of columns. Backward, it is a segment of keys with all columns that see
it; each segment has sums for the queries of its own, which are added up in their order. So no bit
depends on the number of threads.
Source: the algorithm is that of FlashAttention-2 (Dao 2023), section 3.1.
"""

import numpy as np
from numba import njit

from nemotron.ops.attention.columns_kernels import (
    CALL,
    LN_2,
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
    transpose_all,
    write_keys,
    write_y,
)
from nemotron.ops.jit.barrier import take, wait
from nemotron.ops.jit.scalars import items, share
from nemotron.ops.jit.softmax import LOWEST, advance, retreat
from nemotron.ops.jit.strips import ROW, multiply, multiply_transposed
from nemotron.ops.jit.vectors import LANES

COLUMNS = 128
"""Queries of a unit of work."""
PAIR = 2
"""Strips of queries whose sums for keys and values are taken together."""
MANY = 32
"""Pairs after which these sums are added to those of all: long sums lose digits."""
KEYS = 64
"""Keys of a block; a segment has whole blocks."""
EIGHT = 8
"""Rows that products take at least."""


@njit(nogil=True, cache=True)
def forward(address, thread, threads, kind):
    """Fill y, float32, and for each column its highest score and the sum of powers."""
    call = items(address, 1, CALL)[0]
    scratch = call.scratch + thread * call.scratch_size
    sides = call.sides
    first, last = share(sides * call.blocks, thread, threads)
    for unit in range(first, last):
        _read_block(call, unit // call.blocks, unit % call.blocks * KEYS, kind)
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
def _read_block(call, side, begin, kind):
    """Write a block of keys and values as strips of float32."""
    room = call.blocks * KEYS
    place = (side * room * call.depth + begin * LANES) * 4
    end = min(begin + KEYS, last_key(call, side) + 1)
    read_k(call, side, begin, end, KEYS, call.keys + place, room * ROW, kind)
    read_v(call, side, begin, end, KEYS, call.values + place, room * ROW, kind)


@njit
def _forward(call, side, begin, scratch, kind):
    depth = call.depth
    size = depth * ROW  # a strip of queries
    strips = -(-min(COLUMNS, call.columns - begin) // LANES)
    step = call.blocks * KEYS * ROW
    keys, values = (
        call.keys + side * depth * step // LANES,
        call.values + side * depth * step // LANES,
    )
    scores = scratch
    queries = scores + KEYS * ROW
    sums = queries + COLUMNS * depth * 4
    some = sums + COLUMNS * depth * 4
    tops = some + size
    totals = tops + COLUMNS * 4
    lows = totals + COLUMNS * 4
    highs = lows + COLUMNS * 4
    factor = scale(call) * LOG2_E
    for strip in range(strips):
        first = begin + strip * LANES
        read_q(call, side, first, some, ROW * LANES, factor, kind)
        transpose_all(some, ROW * LANES, queries + strip * size, depth)
        bounds(call, side, first, lows + strip * ROW, highs + strip * ROW)
    fill(sums, strips * LANES * depth, np.float32(0.0))
    fill(tops, COLUMNS, np.float32(LOWEST))
    fill(totals, COLUMNS, np.float32(0.0))
    low, high = int32s(lows, COLUMNS), int32s(highs, COLUMNS)
    end = high[strips * LANES - 1] + 1
    for block in range(low[0] // KEYS * KEYS, end, KEYS):
        stop = min(end, block + KEYS)
        for strip in range(strips):
            lane = strip * LANES
            last = lane + LANES - 1
            start = max(low[lane], block) // EIGHT * EIGHT
            count = -(-(min(high[last] + 1, stop) - start) // EIGHT) * EIGHT
            if count <= 0:
                continue
            offset = start * ROW
            place = strip * size
            multiply(keys + offset, step, depth // LANES, queries + place, scores, count, True)
            low_16, high_16 = lows + strip * ROW, highs + strip * ROW
            hide_unseen(scores, count, np.float32(LOWEST), low_16, high_16, start)
            advance(scores, count, tops + strip * ROW, totals + strip * ROW, sums + place, depth)
            hide_unseen(scores, count, np.float32(0.0), low_16, high_16, start)
            multiply_transposed(
                values + offset, step, depth // LANES, scores, count, sums + place, False
            )
    write_y(call, side, begin, strips, sums, tops, totals, some)


@njit(nogil=True, cache=True)
def backward(address, thread, threads, kind):
    """Fill dq, dk and dv; `logs` are of the sums of powers, `inner` becomes dy · y."""
    call = items(address, 1, CALL)[0]
    scratch = call.scratch + thread * call.scratch_size
    sides = call.rows * call.groups
    first, last = share(call.rows * call.groups * call.strips, thread, threads)
    for unit in range(first, last):
        inner_products(call, unit // call.strips, unit % call.strips * LANES, scratch, kind)
    wait(call.counter, threads)
    units = call.segments * sides
    while units > 0:
        unit = take(call.next)
        if unit >= units:
            break
        _segment(call, unit % sides, unit // sides, scratch, kind)
    wait(call.counter, threads)
    pairs = -(-call.strips // PAIR)
    first, last = share(sides * pairs, thread, threads)
    for unit in range(first, last):
        add_parts(call, unit // pairs, unit % pairs * PAIR, PAIR, scratch, kind)
    wait(call.counter, threads)


@njit
def _segment(call, side, segment, scratch, kind):
    """Fill dk and dv of a segment, and its part of dq for the columns that see it."""
    depth, step = call.depth, call.segment * ROW
    channels = depth // LANES
    size, wide = depth * ROW, call.segment * depth * 4
    keys = scratch
    values = keys + wide
    dk = values + wide
    dv = dk + wide
    sums = dv + wide  # of dk and dv
    powers = sums + 2 * wide
    slopes = powers + PAIR * KEYS * ROW
    queries = slopes + PAIR * KEYS * ROW
    outputs = queries + PAIR * size
    columns_q = outputs + PAIR * size
    columns_dy = columns_q + PAIR * size
    logs = columns_dy + PAIR * size
    inner = logs + PAIR * ROW
    lows = inner + PAIR * ROW
    highs = lows + PAIR * ROW
    begin = segment * call.segment
    end = min(begin + call.segment, call.total)
    stop = min(end, last_key(call, side) + 1)
    read_k(call, side, begin, stop, call.segment, keys, step, kind)
    read_v(call, side, begin, stop, call.segment, values, step, kind)
    fill(dk, 4 * call.segment * depth, np.float32(0.0))  # and what is behind it
    added = 0
    factor, between = scale(call) * LOG2_E, PAIR * ROW * LANES
    for pair in range(-(-call.strips // PAIR)):
        start, finish = seen_keys(call, side, pair * PAIR, PAIR, begin, stop)
        if start >= finish:
            continue
        first = pair * PAIR * LANES
        part = call.parts + ((segment * call.sides + side) * call.strips + pair * PAIR) * size
        strips = min(PAIR, call.strips - pair * PAIR)
        for strip in range(strips):
            column, more = first + strip * LANES, strip * ROW * LANES
            read_q(call, side, column, queries + more, between, factor, kind)
            read_dy(call, side, column, outputs + more, between, kind)
            transpose_all(queries + more, between, columns_q + strip * size, depth)
            transpose_all(outputs + more, between, columns_dy + strip * size, depth)
            bounds(call, side, column, lows + strip * ROW, highs + strip * ROW)
            copy_columns(call, call.logs, side, column, logs + strip * ROW)
            copy_columns(call, call.inner, side, column, inner + strip * ROW)
        is_first = True
        for block in range(begin + (start - begin) // KEYS * KEYS, finish, KEYS):
            key = max(start, block) // EIGHT * EIGHT
            count = -(-(min(finish, block + KEYS) - key) // EIGHT) * EIGHT
            offset = (key - begin) * ROW
            for strip in range(strips):
                p, g = powers + strip * KEYS * ROW, slopes + strip * KEYS * ROW
                multiply(keys + offset, step, channels, columns_q + strip * size, p, count, True)
                multiply(values + offset, step, channels, columns_dy + strip * size, g, count, True)
                retreat(p, g, count, logs + strip * ROW, inner + strip * ROW)
                for some in (p, g):
                    hide_unseen(some, count, np.float32(0.0), lows + strip * ROW,
                                highs + strip * ROW, key)  # fmt: skip
                multiply_transposed(
                    keys + offset, step, channels, g, count, part + strip * size, is_first
                )
            is_first = False
            for channel in range(channels):
                more = channel * step + offset
                multiply(powers, KEYS * ROW, strips, outputs + channel * between, dv + more, count,
                         False)  # fmt: skip
                multiply(slopes, KEYS * ROW, strips, queries + channel * between, dk + more, count,
                         False)  # fmt: skip
        added += 1
        if added % MANY == 0:
            move(dk, sums, 2 * call.segment * depth)
    move(dk, sums, 2 * call.segment * depth)
    write_keys(call, call.dk, side, begin, end, sums, LN_2, kind)
    write_keys(call, call.dv, side, begin, end, sums + wide, np.float32(1.0), kind)


KERNELS = (forward, backward)
