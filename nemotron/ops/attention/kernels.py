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

import math

import numpy as np
from numba import carray, njit

from nemotron.ops.jit.barrier import take, wait
from nemotron.ops.jit.scalars import _pointer, decode, encode, floats, item_size, items, share
from nemotron.ops.jit.softmax import LOWEST, advance, hide, retreat
from nemotron.ops.jit.strips import (
    ROW,
    multiply,
    multiply_transposed,
    scale_rows,
    transpose,
    widen,
)
from nemotron.ops.jit.vectors import LANES, dot

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
LOG2_E = np.float32(math.log2(math.e))
LN_2 = np.float32(math.log(2.0))


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
    end = min(begin + KEYS, _last_key(call, side) + 1)
    _read_keys(call, call.k, call.k_row, call.k_token, call.k_head, side, begin, end, KEYS,
               call.keys + place, room * ROW, kind)  # fmt: skip
    _read_keys(call, call.v, call.v_row, call.v_token, call.v_head, side, begin, end, KEYS,
               call.values + place, room * ROW, kind)  # fmt: skip


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
    factor = _scale(call) * LOG2_E
    for strip in range(strips):
        first = begin + strip * LANES
        _read(call, call.q, call.q_row, call.q_token, call.q_head, side, first, some, ROW * LANES,
              factor, kind)  # fmt: skip
        _transpose_all(some, ROW * LANES, queries + strip * size, depth)
        _bounds(call, side, first, lows + strip * ROW, highs + strip * ROW)
    _fill(sums, strips * LANES * depth, np.float32(0.0))
    _fill(tops, COLUMNS, np.float32(LOWEST))
    _fill(totals, COLUMNS, np.float32(0.0))
    low, high = _integers(lows, COLUMNS), _integers(highs, COLUMNS)
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
            more = strip * ROW
            # all columns see the keys between these two
            seen_from = min(max(low[last] - start, 0), count)
            seen_to = min(max(high[lane] + 1 - start, seen_from), count)
            _hide(scores, seen_from, seen_to, count, np.float32(LOWEST), lows + more, highs + more,
                  start)  # fmt: skip
            advance(scores, count, tops + more, totals + more, sums + place, depth)
            _hide(scores, seen_from, seen_to, count, np.float32(0.0), lows + more, highs + more,
                  start)  # fmt: skip
            multiply_transposed(
                values + offset, step, depth // LANES, scores, count, sums + place, False
            )
    top, total = floats(tops, COLUMNS), floats(totals, COLUMNS)
    for strip in range(strips):
        first = begin + strip * LANES
        columns = min(LANES, call.columns - first)
        at = side * call.columns + first
        for_top = floats(call.tops + at * 4, columns)
        for_total = floats(call.totals + at * 4, columns)
        for lane in range(columns):
            for_top[lane] = top[strip * LANES + lane]
            for_total[lane] = total[strip * LANES + lane]
        for lane in range(LANES):
            total[strip * LANES + lane] = np.float32(1.0) / total[strip * LANES + lane]
        scale_rows(sums + strip * size, totals + strip * ROW, depth)
        _write(call, call.y, side, first, sums + strip * size, some, np.float32(1.0),
               np.float32)  # fmt: skip


@njit(nogil=True, cache=True)
def backward(address, thread, threads, kind):
    """Fill dq, dk and dv; `logs` are of the sums of powers, `inner` becomes dy · y."""
    call = items(address, 1, CALL)[0]
    scratch = call.scratch + thread * call.scratch_size
    sides = call.rows * call.groups
    first, last = share(call.rows * call.groups * call.strips, thread, threads)
    for unit in range(first, last):
        _inner(call, unit // call.strips, unit % call.strips * LANES, scratch, kind)
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
        _add_parts(call, unit // pairs, unit % pairs, scratch, kind)
    wait(call.counter, threads)


@njit
def _inner(call, side, first, scratch, kind):
    """Write dy · y of the columns of a strip."""
    size = call.head_size
    _read(call, call.dy, call.dy_row, call.dy_token, call.dy_head, side, first, scratch,
          ROW * LANES, np.float32(1.0), kind)  # fmt: skip
    row = scratch + LANES * call.depth * 4
    numbers = floats(row, call.depth)
    columns = min(LANES, call.columns - first)
    target = floats(call.inner + (side * call.columns + first) * 4, columns)
    for lane in range(columns):
        for strip in range(call.depth // LANES):
            part = floats(scratch + (strip * LANES + lane) * ROW, LANES)
            for p in range(LANES):
                numbers[strip * LANES + p] = part[p]
        token, head = _place(call, side, first + lane)
        y = ((side // call.groups * call.length + token) * call.heads + head) * size
        target[lane] = dot(row, call.y + y * 4, size, np.float32)


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
    low, high = _integers(lows, PAIR * LANES), _integers(highs, PAIR * LANES)
    begin = segment * call.segment
    end = min(begin + call.segment, call.total)
    stop = min(end, _last_key(call, side) + 1)
    _read_keys(call, call.k, call.k_row, call.k_token, call.k_head, side, begin, stop, call.segment,
               keys, step, kind)  # fmt: skip
    _read_keys(call, call.v, call.v_row, call.v_token, call.v_head, side, begin, stop, call.segment,
               values, step, kind)  # fmt: skip
    _fill(dk, 4 * call.segment * depth, np.float32(0.0))  # and what is behind it
    added = 0
    factor, between = _scale(call) * LOG2_E, PAIR * ROW * LANES
    for pair in range(-(-call.strips // PAIR)):
        start, finish = _seen(call, side, pair, begin, stop)
        if start >= finish:
            continue
        first = pair * PAIR * LANES
        part = call.parts + ((segment * call.sides + side) * call.strips + pair * PAIR) * size
        strips = min(PAIR, call.strips - pair * PAIR)
        for strip in range(strips):
            column, more = first + strip * LANES, strip * ROW * LANES
            _read(call, call.q, call.q_row, call.q_token, call.q_head, side, column,
                  queries + more, between, factor, kind)  # fmt: skip
            _read(call, call.dy, call.dy_row, call.dy_token, call.dy_head, side, column,
                  outputs + more, between, np.float32(1.0), kind)  # fmt: skip
            _transpose_all(queries + more, between, columns_q + strip * size, depth)
            _transpose_all(outputs + more, between, columns_dy + strip * size, depth)
            _bounds(call, side, column, lows + strip * ROW, highs + strip * ROW)
            _copy_columns(call, call.logs, side, column, logs + strip * ROW)
            _copy_columns(call, call.inner, side, column, inner + strip * ROW)
        is_first = True
        for block in range(begin + (start - begin) // KEYS * KEYS, finish, KEYS):
            key = max(start, block) // EIGHT * EIGHT
            count = -(-(min(finish, block + KEYS) - key) // EIGHT) * EIGHT
            offset = (key - begin) * ROW
            for strip in range(strips):
                p, g = powers + strip * KEYS * ROW, slopes + strip * KEYS * ROW
                multiply(keys + offset, step, channels, columns_q + strip * size, p, count, True)
                multiply(values + offset, step, channels, columns_dy + strip * size, g, count, True)
                lane, more = strip * LANES, strip * ROW
                retreat(p, g, count, logs + more, inner + more)
                seen_from = min(max(low[lane + LANES - 1] - key, 0), count)
                seen_to = min(max(high[lane] + 1 - key, seen_from), count)
                for some in (p, g):
                    _hide(some, seen_from, seen_to, count, np.float32(0.0), lows + more,
                          highs + more, key)  # fmt: skip
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
            _move(dk, sums, 2 * call.segment * depth)
    _move(dk, sums, 2 * call.segment * depth)
    _write_keys(call, call.dk, side, begin, end, sums, LN_2, kind)
    _write_keys(call, call.dv, side, begin, end, sums + wide, np.float32(1.0), kind)


@njit
def _add_parts(call, side, pair, scratch, kind):
    """Write dq of a pair of strips: the sum over the segments that they see."""
    size = call.depth * ROW
    sums, some = scratch, scratch + size
    total = floats(sums, call.depth * LANES)
    for strip in range(pair * PAIR, min((pair + 1) * PAIR, call.strips)):
        total[:] = np.float32(0.0)
        for segment in range(call.segments):
            begin = segment * call.segment
            start, finish = _seen(call, side, pair, begin, min(begin + call.segment, call.total))
            if start < finish:
                place = ((segment * call.sides + side) * call.strips + strip) * size
                part = floats(call.parts + place, call.depth * LANES)
                for p in range(call.depth * LANES):
                    total[p] += part[p]
        _write(call, call.dq, side, strip * LANES, sums, some, _scale(call), kind)


@njit
def _hide(strip, seen_from, seen_to, count, value, lows, highs, first):
    """Write a value where a column does not see a row's key: before and behind some rows."""
    if seen_from > 0:
        hide(strip, 0, seen_from, value, lows, highs, first)
    if seen_to < count:
        hide(strip, seen_to, count, value, lows, highs, first)


@njit
def _scale(call):
    return np.float32(1.0 / math.sqrt(call.head_size))


@njit
def _place(call, side, column):
    """Return the token and the query head of a column."""
    ratio = call.heads // call.groups
    return column // ratio, side % call.groups * ratio + column % ratio


@njit
def _integers(address, count):
    return carray(_pointer(address), (count,), np.int32)


@njit
def _fill(target, count, value):
    floats(target, count)[:] = value


@njit
def _move(source, target, count):
    """Add numbers to others, and leave zeros."""
    numbers, sums = floats(source, count), floats(target, count)
    for i in range(count):
        sums[i] += numbers[i]
        numbers[i] = np.float32(0.0)


@njit
def _token(call, side, column):
    """Return the index of a column's token, or of the last one, in `lows` and `highs`."""
    token, _ = _place(call, side, min(column, call.columns - 1))
    return side // call.groups * call.length + token


@njit
def _bounds(call, side, first, lows, highs):
    """Write the first and last key that each column of a strip sees."""
    tokens = call.rows * call.length
    every_low, every_high = _integers(call.lows, tokens), _integers(call.highs, tokens)
    low, high = _integers(lows, LANES), _integers(highs, LANES)
    ratio = call.heads // call.groups
    token, head = _token(call, side, first), first % ratio
    last = _token(call, side, call.columns)
    for lane in range(LANES):
        low[lane], high[lane] = every_low[token], every_high[token]
        head += 1
        if head == ratio:
            token, head = min(token + 1, last), 0


@njit
def _seen(call, side, pair, begin, end):
    """Return which keys of a range the columns of a pair of strips see."""
    tokens = call.rows * call.length
    first = _token(call, side, pair * PAIR * LANES)
    last = _token(call, side, (pair + 1) * PAIR * LANES - 1)
    low, high = _integers(call.lows, tokens)[first], _integers(call.highs, tokens)[last]
    return max(np.int64(low), begin), min(np.int64(high) + 1, end)


@njit
def _last_key(call, side):
    token = _token(call, side, call.columns)
    return np.int64(_integers(call.highs, token + 1)[token])


@njit
def _copy_columns(call, address, side, first, target):
    """Copy a number for each column of a strip; behind the last there are zeros."""
    columns = min(LANES, call.columns - first)
    source = floats(address + (side * call.columns + first) * 4, columns)
    numbers = floats(target, LANES)
    for lane in range(LANES):
        numbers[lane] = source[lane] if lane < columns else np.float32(0.0)


@njit
def _read_row(source, target, step, count, factor, kind):
    """Write a row of numbers, times a factor, into strips that begin `step` bytes apart."""
    whole = count // LANES
    for strip in range(whole):
        widen(source + strip * LANES * item_size(kind), target + strip * step, factor, kind)
    if whole * LANES < count:
        rest = count - whole * LANES
        numbers = items(source + whole * LANES * item_size(kind), rest, kind)
        out = floats(target + whole * step, LANES)
        for p in range(LANES):
            out[p] = decode(numbers[p]) * factor if p < rest else np.float32(0.0)


@njit
def _clear_row(target, step, strips):
    for strip in range(strips):
        floats(target + strip * step, LANES)[:] = np.float32(0.0)


@njit
def _read(call, address, row, token, head, side, first, target, step, factor, kind):
    """Write sixteen columns into strips of channels; those behind the last are zeros."""
    ratio = call.heads // call.groups
    size = item_size(kind)
    base = address + (side // call.groups * row + side % call.groups * ratio * head) * size
    t, h = first // ratio, first % ratio
    for lane in range(LANES):
        place = target + lane * ROW
        if first + lane < call.columns:
            source = base + (t * token + h * head) * size
            _read_row(source, place, step, call.head_size, factor, kind)
        else:
            _clear_row(place, step, call.depth // LANES)
        h += 1
        if h == ratio:
            t, h = t + 1, 0


@njit
def _read_keys(call, address, row, token, head, side, begin, end, room, target, step, kind):
    """Write keys or values into strips of channels; those behind the last are zeros."""
    size = item_size(kind)
    source = address + (side // call.groups * row + side % call.groups * head) * size
    count, strips = call.head_size, call.depth // LANES
    for key in range(begin, begin + room):
        place = target + (key - begin) * ROW
        if key < end:
            _read_row(source + key * token * size, place, step, count, np.float32(1.0), kind)
        else:
            _clear_row(place, step, strips)


@njit
def _transpose_all(source, step, target, depth):
    """Write strips of channels as one of columns."""
    for strip in range(depth // LANES):
        transpose(source + strip * step, target + strip * LANES * ROW)


@njit
def _write_row(source, step, target, count, factor, kind):
    numbers = items(target, count, kind)
    whole = count // LANES
    for strip in range(whole):
        part = floats(source + strip * step, LANES)
        for p in range(LANES):
            numbers[strip * LANES + p] = encode(part[p] * factor, kind)
    part = floats(source + whole * step, LANES)
    for p in range(count - whole * LANES):
        numbers[whole * LANES + p] = encode(part[p] * factor, kind)


@njit
def _write(call, address, side, first, source, some, factor, kind):
    """Write a strip of columns into [rows, length, heads, head_size]; `some` is room for it."""
    for strip in range(call.depth // LANES):
        more = strip * LANES * ROW
        transpose(source + more, some + more)
    ratio, size = call.heads // call.groups, call.head_size * item_size(kind)
    token = side // call.groups * call.length + first // ratio
    begin, head = side % call.groups * ratio, first % ratio
    for lane in range(min(LANES, call.columns - first)):
        target = address + (token * call.heads + begin + head) * size
        _write_row(some + lane * ROW, LANES * ROW, target, call.head_size, factor, kind)
        head += 1
        if head == ratio:
            token, head = token + 1, 0


@njit
def _write_keys(call, address, side, begin, end, source, factor, kind):
    """Write sums of a segment into [rows, total, groups, head_size]."""
    for key in range(begin, end):
        place = (side // call.groups * call.total + key) * call.groups + side % call.groups
        target = address + place * call.head_size * item_size(kind)
        _write_row(
            source + (key - begin) * ROW, call.segment * ROW, target, call.head_size, factor, kind
        )


FIELDS = (
    *("rows", "length", "total", "heads", "groups", "sides", "head_size", "depth", "columns"),
    *(
        "strips",
        "blocks",
        "keys",
        "values",
        "segment",
        "segments",
        "q",
        "q_row",
        "q_token",
        "q_head",
        "k",
        "k_row",
        "k_token",
    ),
    *("k_head", "v", "v_row", "v_token", "v_head", "lows", "highs", "y", "tops", "totals"),
    *("dy", "dy_row", "dy_token", "dy_head", "logs", "inner", "parts", "dq", "dk", "dv"),
    *("next", "scratch", "scratch_size", "counter"),
)
CALL = np.dtype([(name, np.int64) for name in FIELDS])
"""Sizes, addresses, and strides in numbers; `depth` is the head's size in whole strips."""
KERNELS = (forward, backward)
