"""Attention to the keys and values of a text, in blocks of memory, for one key-value head."""

import math

import numpy as np
from numba import njit

from nemotron.ops.jit.scalars import (
    encode,
    exp,
    floats,
    integers,
    item_size,
    items,
    share,
)
from nemotron.ops.jit.vectors import add_scaled, dot


@njit
def attend(call, layer, thread, threads, kind):
    """Attend for this thread's share of texts and heads: from `wide` [q, k, v] to `mid`."""
    size, heads = layer.head_size, layer.key_heads
    lengths = integers(call.lengths, call.rows)
    scratch = call.scratch + thread * call.scratch_size
    first, last = share(call.rows * heads, thread, threads)
    for unit in range(first, last):
        row, head = unit // heads, unit % heads
        begin = call.wide + row * call.length * call.wide_width * 4
        for token in range(call.length):
            key = begin + token * call.wide_width * 4 + (layer.queries + head) * size * 4
            place = _place(call, layer, row, head, lengths[row] + token, kind)
            _store(layer.keys + place, key, size, kind)
            _store(layer.values + place, key + heads * size * 4, size, kind)
        for token in range(call.length):
            q = begin + token * call.wide_width * 4
            y = call.mid + (row * call.length + token) * call.mid_width * 4
            for query in range(head * layer.queries // heads, (head + 1) * layer.queries // heads):
                offset = query * size * 4
                end = lengths[row] + token + 1
                _attend_one(call, layer, row, head, end, q + offset, y + offset, scratch, kind)


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
def _attend_one(call, layer, row, head, end, q, y, scratch, kind):
    """Softmax over the keys before `end`, all scores first."""
    size, first = layer.head_size, call.skipped
    step = layer.key_heads * size * item_size(kind)
    scores = floats(scratch, end)
    scale, top = np.float32(1.0 / math.sqrt(size)), np.float32(-np.inf)
    position = first
    while position < end:
        key = layer.keys + _place(call, layer, row, head, position, kind)
        stop = min(end, (position // call.block_size + 1) * call.block_size)
        for place in range(position, stop):
            score = dot(q, key, size, kind) * scale
            scores[place] = score
            top = max(top, score)
            key += step
        position = stop
    total = np.float32(0.0)
    for place in range(first, end):
        scores[place] = exp(scores[place] - top)
    for place in range(first, end):
        total += scores[place]
    result = floats(y, size)
    result[:] = np.float32(0.0)
    position = first
    while position < end:
        value = layer.values + _place(call, layer, row, head, position, kind)
        stop = min(end, (position // call.block_size + 1) * call.block_size)
        for place in range(position, stop):
            add_scaled(y, value, scores[place], size, kind)
            value += step
        position = stop
    for i in range(size):
        result[i] = result[i] / total
