"""What attention's kernels read and write: columns of queries, keys, and who sees whom.

The queries of a key-value head are columns, token by token and head by head within it; sixteen of
them are the lanes of a vector. What has a number for each query and channel is read into strips of
sixteen channels, and can be turned into strips [channels, 16] of queries; keys and values lie in
strips of sixteen channels, [channels / 16, keys, 16].
"""

import math

import numpy as np
from numba import carray, njit

from nemotron.ops.jit.scalars import _pointer, decode, encode, floats, item_size, items
from nemotron.ops.jit.softmax import hide
from nemotron.ops.jit.strips import ROW, scale_rows, transpose, widen
from nemotron.ops.jit.vectors import LANES, dot

LOG2_E = np.float32(math.log2(math.e))
LN_2 = np.float32(math.log(2.0))

FIELDS = (
    *("rows", "length", "total", "heads", "groups", "sides", "head_size", "depth", "columns"),
    *("strips", "blocks", "keys", "values", "segment", "segments"),
    *("q", "q_row", "q_token", "q_head", "k", "k_row", "k_token", "k_head"),
    *("v", "v_row", "v_token", "v_head", "lows", "highs", "y", "tops", "totals"),
    *("dy", "dy_row", "dy_token", "dy_head", "logs", "inner", "parts", "dq", "dk", "dv"),
    *("next", "scratch", "scratch_size", "counter"),
)
CALL = np.dtype([(name, np.int64) for name in FIELDS])
"""Sizes, addresses, and strides in numbers; `depth` is the head's size in whole strips."""


@njit
def scale(call):
    """Return what scores are multiplied by."""
    return np.float32(1.0 / math.sqrt(call.head_size))


@njit
def place_of(call, side, column):
    """Return the token and the query head of a column."""
    ratio = call.heads // call.groups
    return column // ratio, side % call.groups * ratio + column % ratio


@njit
def int32s(address, count):
    """Return the int32 numbers that begin at an address."""
    return carray(_pointer(address), (count,), np.int32)


@njit
def _token(call, side, column):
    """Return the index of a column's token, or of the last one, in `lows` and `highs`."""
    token, _ = place_of(call, side, min(column, call.columns - 1))
    return side // call.groups * call.length + token


@njit
def bounds(call, side, first, lows, highs):
    """Write the first and last key that each column of a strip sees."""
    tokens = call.rows * call.length
    every_low, every_high = int32s(call.lows, tokens), int32s(call.highs, tokens)
    low, high = int32s(lows, LANES), int32s(highs, LANES)
    ratio = call.heads // call.groups
    token, head = _token(call, side, first), first % ratio
    last = _token(call, side, call.columns)
    for lane in range(LANES):
        low[lane], high[lane] = every_low[token], every_high[token]
        head += 1
        if head == ratio:
            token, head = min(token + 1, last), 0


@njit
def seen_keys(call, side, strip, strips, begin, end):
    """Return which keys of a range the columns of some strips see."""
    tokens = call.rows * call.length
    first = _token(call, side, strip * LANES)
    last = _token(call, side, (strip + strips) * LANES - 1)
    low, high = int32s(call.lows, tokens)[first], int32s(call.highs, tokens)[last]
    return max(np.int64(low), begin), min(np.int64(high) + 1, end)


@njit
def last_key(call, side):
    """Return the last key that any query of a row sees."""
    token = _token(call, side, call.columns)
    return np.int64(int32s(call.highs, token + 1)[token])


@njit
def hide_unseen(strip, count, value, lows, highs, first):
    """Write a value where a column does not see the key of a row; that of row 0 is `first`."""
    # all columns see the keys between these two
    seen_from = min(max(int32s(lows, LANES)[LANES - 1] - first, 0), count)
    seen_to = min(max(int32s(highs, LANES)[0] + 1 - first, seen_from), count)
    if seen_from > 0:
        hide(strip, 0, seen_from, value, lows, highs, first)
    if seen_to < count:
        hide(strip, seen_to, count, value, lows, highs, first)


@njit
def copy_columns(call, address, side, first, target):
    """Copy a number for each column of a strip; behind the last there are zeros."""
    columns = min(LANES, call.columns - first)
    source = floats(address + (side * call.columns + first) * 4, columns)
    numbers = floats(target, LANES)
    for lane in range(LANES):
        numbers[lane] = source[lane] if lane < columns else np.float32(0.0)


@njit
def fill(target, count, value):
    """Write a number so many times."""
    floats(target, count)[:] = value


@njit
def move(source, target, count):
    """Add numbers to others, and leave zeros."""
    numbers, sums = floats(source, count), floats(target, count)
    for i in range(count):
        sums[i] += numbers[i]
        numbers[i] = np.float32(0.0)


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
def _read_columns(call, address, row, token, head, side, first, target, step, factor, kind):
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
def read_q(call, side, first, target, step, factor, kind):
    """Write sixteen queries, times a factor, into strips of channels, `step` bytes apart."""
    _read_columns(call, call.q, call.q_row, call.q_token, call.q_head, side, first, target, step,
                  factor, kind)  # fmt: skip


@njit
def read_dy(call, side, first, target, step, kind):
    """Write the gradients of sixteen columns into strips of channels, `step` bytes apart."""
    _read_columns(call, call.dy, call.dy_row, call.dy_token, call.dy_head, side, first, target,
                  step, np.float32(1.0), kind)  # fmt: skip


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
def read_k(call, side, begin, end, room, target, step, kind):
    """Write keys into strips of channels, with zeros behind the last until `room` is filled."""
    _read_keys(call, call.k, call.k_row, call.k_token, call.k_head, side, begin, end, room, target,
               step, kind)  # fmt: skip


@njit
def read_v(call, side, begin, end, room, target, step, kind):
    """Write values into strips of channels, with zeros behind the last until `room` is filled."""
    _read_keys(call, call.v, call.v_row, call.v_token, call.v_head, side, begin, end, room, target,
               step, kind)  # fmt: skip


@njit
def transpose_all(source, step, target, depth):
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
def write_columns(call, address, side, first, source, some, factor, kind):
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
def write_y(call, side, first, strips, sums, tops, totals, some):
    """Write the sums of values over totals as y, and tops and totals of the columns of strips.

    Leaves the inverse of each total in its place; `some` is room for a strip.
    """
    size = call.depth * ROW
    for strip in range(strips):
        begin = first + strip * LANES
        columns, at = min(LANES, call.columns - begin), side * call.columns + begin
        top, total = floats(tops + strip * ROW, LANES), floats(totals + strip * ROW, LANES)
        floats(call.tops + at * 4, columns)[:] = top[:columns]
        floats(call.totals + at * 4, columns)[:] = total[:columns]
        for lane in range(LANES):
            total[lane] = np.float32(1.0) / total[lane]
        scale_rows(sums + strip * size, totals + strip * ROW, call.depth)
        write_columns(call, call.y, side, begin, sums + strip * size, some, np.float32(1.0),
                      np.float32)  # fmt: skip


@njit
def write_keys(call, address, side, begin, end, source, factor, kind):
    """Write sums of a segment into [rows, total, groups, head_size]."""
    for key in range(begin, end):
        place = (side // call.groups * call.total + key) * call.groups + side % call.groups
        target = address + place * call.head_size * item_size(kind)
        _write_row(
            source + (key - begin) * ROW, call.segment * ROW, target, call.head_size, factor, kind
        )


@njit
def inner_products(call, side, first, scratch, kind):
    """Write dy · y of the columns of a strip."""
    size = call.head_size
    read_dy(call, side, first, scratch, ROW * LANES, kind)
    row = scratch + LANES * call.depth * 4
    numbers = floats(row, call.depth)
    columns = min(LANES, call.columns - first)
    target = floats(call.inner + (side * call.columns + first) * 4, columns)
    for lane in range(columns):
        for strip in range(call.depth // LANES):
            part = floats(scratch + (strip * LANES + lane) * ROW, LANES)
            for p in range(LANES):
                numbers[strip * LANES + p] = part[p]
        token, head = place_of(call, side, first + lane)
        y = ((side // call.groups * call.length + token) * call.heads + head) * size
        target[lane] = dot(row, call.y + y * 4, size, np.float32)


@njit
def add_parts(call, side, first, strips, scratch, kind):
    """Write dq of strips that were taken together: the sum over the segments that they see."""
    size = call.depth * ROW
    sums, some = scratch, scratch + size
    total = floats(sums, call.depth * LANES)
    for strip in range(first, min(first + strips, call.strips)):
        total[:] = np.float32(0.0)
        for segment in range(call.segments):
            begin = segment * call.segment
            stop = min(begin + call.segment, call.total)
            start, finish = seen_keys(call, side, first, strips, begin, stop)
            if start < finish:
                place = ((segment * call.sides + side) * call.strips + strip) * size
                part = floats(call.parts + place, call.depth * LANES)
                for p in range(call.depth * LANES):
                    total[p] += part[p]
        write_columns(call, call.dq, side, strip * LANES, sums, some, scale(call), kind)
