"""Attention to the keys and values of a text, in blocks of memory."""

import math

import numpy as np
from numba import njit

from nemotron.ops.jit.scalars import (
    encode,
    floats,
    integers,
    item_size,
    items,
    share,
)
from nemotron.ops.jit.vectors import LANES, add_scaled, dot
from nemotron.ops.token_step.kernels.elementwise import apply_exp
from nemotron.ops.token_step.kernels.sixteen import add_up, largest, score_16, weigh

QUERIES = 4
"""Queries of a key-value head that read its values together."""


@njit
def store(call, layer, thread, threads, kind):
    """Store keys and values of this thread's share of tokens, from `wide` [q, k, v]."""
    size, heads = layer.head_size, layer.key_heads
    lengths = integers(call.lengths, call.rows)
    first, last = share(call.rows * call.length, thread, threads)
    for number in range(first, last):
        row, token = number // call.length, number % call.length
        begin = call.wide + number * call.wide_width * 4
        for head in range(heads):
            key = begin + (layer.queries + head) * size * 4
            place = _place(call, layer, row, head, lengths[row] + token, kind)
            _store(layer.keys + place, key, size, kind)
            _store(layer.values + place, key + heads * size * 4, size, kind)


@njit
def attend(call, layer, thread, threads, kind):
    """Attend for this thread's share of texts, heads and tokens: from `wide` [q, k, v] to `mid`."""
    heads, lengths = layer.key_heads, integers(call.lengths, call.rows)
    # later tokens read more keys, so that each thread takes one of every few
    for unit in range(thread, call.rows * heads * call.length, threads):
        token, row = unit % call.length, unit // (call.length * heads)
        head = unit // call.length % heads
        _attend_head(call, layer, row, head, token, lengths[row] + token + 1, thread, kind)


@njit
def _place(call, layer, row, head, position, kind):
    """Return how far from the beginning of all keys one of a text lies, in bytes."""
    table = integers(call.tables + row * call.table_length * 8, call.table_length)
    block = table[position // call.block_size]
    number = block * call.block_size + position % call.block_size
    return (number * layer.key_heads + head) * layer.head_size * item_size(kind)


@njit
def _store(target, source, count, kind):
    new, stored = floats(source, count), items(target, count, kind)
    for i in range(count):
        stored[i] = encode(new[i], kind)


@njit
def _attend_head(call, layer, row, head, token, end, thread, kind):
    """Attend for the queries of a key-value head, some of them together."""
    number, size = row * call.length + token, layer.head_size
    scores = call.scratch + thread * call.scratch_size
    first = head * layer.queries // layer.key_heads
    last = (head + 1) * layer.queries // layer.key_heads
    while first < last:
        count = min(QUERIES, last - first)
        q = call.wide + (number * call.wide_width + first * size) * 4
        y = call.mid + (number * call.mid_width + first * size) * 4
        floats(y, count * size)[:] = np.float32(0.0)
        _score(call, layer, row, head, end, q, count, scores, kind)
        for query in range(count):
            _exponentiate(call, end, scores + query * _score_size(end))
        _mix_values(call, layer, row, head, end, y, count, scores, kind)
        for query in range(count):
            begin = scores + query * _score_size(end) + call.skipped * 4
            total = add_up(begin, end - call.skipped)
            result = floats(y + query * size * 4, size)
            for i in range(size):
                result[i] = result[i] / total
        first += count


@njit
def _score_size(end):
    """Return the bytes of a query's scores."""
    return end * 4


@njit
def _score(call, layer, row, head, end, q, count, scores, kind):
    """Write the scaled products of some queries with the keys before `end`."""
    size, position = layer.head_size, call.skipped
    step = layer.key_heads * size * item_size(kind)
    scale = np.float32(1.0 / math.sqrt(size))
    while position < end:
        begin = layer.keys + _place(call, layer, row, head, position, kind)
        stop = min(end, (position // call.block_size + 1) * call.block_size)
        for query in range(count):
            own, target = q + query * size * 4, scores + query * _score_size(end)
            place, key = position, begin
            if size % LANES == 0:
                while place + LANES <= stop:
                    score_16(own, key, step, size, scale, target + place * 4, kind)
                    place += LANES
                    key += LANES * step
            numbers = floats(target, end)
            while place < stop:
                numbers[place] = dot(own, key, size, kind) * scale
                place += 1
                key += step
        position = stop


@njit
def _exponentiate(call, end, address):
    """Write the exponentials of scores, the largest of which becomes 1."""
    first = call.skipped
    top = largest(address + first * 4, end - first)
    apply_exp(address + first * 4, top, end - first)


@njit
def _mix_values(call, layer, row, head, end, y, count, scores, kind):
    """Add up the values before `end` for some queries, each times its score."""
    size, position = layer.head_size, call.skipped
    item = item_size(kind)
    step = layer.key_heads * size * item
    while position < end:
        value = layer.values + _place(call, layer, row, head, position, kind)
        stop = min(end, (position // call.block_size + 1) * call.block_size)
        own = scores + position * 4
        if size % LANES == 0:
            weigh(
                own, _score_size(end), count, value, step, stop - position, y, size * 4,
                size, item, kind,
            )  # fmt: skip
        else:
            for query in range(count):
                weights = floats(own + query * _score_size(end), stop - position)
                for place in range(stop - position):
                    target = y + query * size * 4
                    add_scaled(target, value + place * step, weights[place], size, kind)
        position = stop
