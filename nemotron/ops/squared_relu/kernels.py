"""The activation of experts in one pass, and its gradients in another; a unit is a row."""

import numpy as np
from numba import njit

from nemotron.ops.jit.barrier import wait
from nemotron.ops.jit.scalars import decode, encode, floats, item_size, items, share
from nemotron.ops.jit.vectors import dot

ZERO, TWO = np.float32(0.0), np.float32(2.0)


@njit(nogil=True, cache=True)
def forward(address, thread, threads, kind):
    """Fill y = relu(x)² w."""
    call = items(address, 1, CALL)[0]
    first, last = share(call.rows, thread, threads)
    for row in range(first, last):
        place = row * call.size * item_size(kind)
        x, y = items(call.x + place, call.size, kind), items(call.y + place, call.size, kind)
        weight = floats(call.weight, call.rows)[row]
        for c in range(call.size):
            positive = max(decode(x[c]), ZERO)
            y[c] = encode(positive * positive * weight, kind)
    wait(call.counter, threads)


@njit(nogil=True, cache=True)
def backward(address, thread, threads, kind):
    """Fill dx = 2 relu(x) w dy and dw = sum of relu(x)² dy."""
    call = items(address, 1, CALL)[0]
    scratch = call.scratch + thread * call.scratch_size
    positives, slopes = floats(scratch, call.size), floats(scratch + call.size * 4, call.size)
    first, last = share(call.rows, thread, threads)
    for row in range(first, last):
        place = row * call.size * item_size(kind)
        x, dy = items(call.x + place, call.size, kind), items(call.dy + place, call.size, kind)
        dx = items(call.dx + place, call.size, kind)
        twice = floats(call.weight, call.rows)[row] * TWO
        # one place is written in each loop, or the compiler makes no vectors of it
        for c in range(call.size):
            slopes[c] = max(decode(x[c]), ZERO) * decode(dy[c])
        for c in range(call.size):
            dx[c] = encode(slopes[c] * twice, kind)
        for c in range(call.size):
            positives[c] = max(decode(x[c]), ZERO)
        total = dot(scratch, scratch + call.size * 4, call.size, np.float32)
        floats(call.dweight, call.rows)[row] = total
    wait(call.counter, threads)


FIELDS = ("rows", "size", "x", "weight", "y", "dy", "dx", "dweight")
CALL = np.dtype([(n, np.int64) for n in (*FIELDS, "scratch", "scratch_size", "counter")])
"""Sizes and addresses."""
KERNELS = (forward, backward)
