"""The recurrence token by token: the state of half a head, or less, stays in a core's cache.

A unit is a group of heads of a row: B and C are read once for its heads, and their gradients are
added up in the order of the heads, so no bit depends on the number of threads. States are
[heads, halves, N, 32]: 32 numbers of a head side by side, for each of its N places in B and C.
"""

import numpy as np
from numba import njit

from nemotron.ops.jit.barrier import wait
from nemotron.ops.jit.scalars import (
    decode,
    doubles,
    encode,
    exp,
    expm1,
    floats,
    integers,
    item_size,
    items,
    share,
)
from nemotron.ops.jit.vectors import advance_lanes, repeat_lanes, retreat_lanes

CHUNK = 32
"""Tokens whose states are computed again together for the gradient."""
LANES = 32
"""Numbers of a head that are worked on together."""

NEAR_1 = np.float32(-0.5)
"""Logarithm of the decays that are closer to 1 than to 0."""


@njit(nogil=True, cache=True)
def forward(calls, thread, threads, kind):
    """Fill y and the states at the beginning of each chunk; `state` becomes the last one."""
    call = calls[0]
    first, last = share(call.rows * call.groups, thread, threads)
    scratch = call.scratch + thread * call.scratch_size
    for unit in range(first, last):
        _forward(call, unit // call.groups, unit % call.groups, scratch, kind)
    wait(call.counter, threads)


@njit
def _forward(call, row, group, scratch, kind):
    N, heads = call.state_size, call.heads // call.groups
    B = scratch
    C = B + CHUNK * N * 4
    u = C + CHUNK * N * 4
    y = u + LANES * 4
    size = N * LANES * 4
    for chunk in range(call.chunks):
        begin = chunk * CHUNK
        end = min(begin + CHUNK, call.length)
        _read_group(call, row, group, begin, end, B, C, kind)
        for head in range(group * heads, (group + 1) * heads):
            for half in range(call.halves):
                place = (row * call.heads + head) * call.halves + half
                state = call.state + place * size
                _copy(state, call.states + (place * call.chunks + chunk) * size, N * LANES)
                for token in range(begin, end):
                    if _begins_document(call, row, token):
                        _clear(state, N * LANES)
                    dt, base, less = _decay(call, row, head, token)
                    _input(call, row, head, half, token, dt, u, kind)
                    t = (token - begin) * N * 4
                    advance_lanes(state, B + t, C + t, u, y, base, less, N)
                    _output(call, row, head, half, token, y, kind)


@njit
def _output(call, row, head, half, token, y, kind):
    """Write y + D x of 32 numbers."""
    x = _numbers(call.x, call.x_row, call.x_token, row, token, head, half, call.head_size, kind)
    place = ((row * call.length + token) * call.heads + head) * call.head_size + half * LANES
    target = items(call.y + place * item_size(kind), LANES, kind)
    sums, skip = floats(y, LANES), floats(call.D, call.heads)[head]
    for p in range(LANES):
        target[p] = encode(sums[p] + skip * decode(x[p]), kind)


@njit(nogil=True, cache=True)
def backward(calls, thread, threads, kind):
    """Fill dx, dB, dC and ddt, add up dA and dD; `state` goes back to the first one's gradient."""
    call = calls[0]
    first, last = share(call.rows * call.groups, thread, threads)
    scratch = call.scratch + thread * call.scratch_size
    for unit in range(first, last):
        _backward(call, unit // call.groups, unit % call.groups, scratch, kind)
    wait(call.counter, threads)


@njit
def _backward(call, row, group, scratch, kind):
    N, heads = call.state_size, call.heads // call.groups
    B = scratch
    C = B + CHUNK * N * 4
    dB = C + CHUNK * N * 4
    dC = dB + CHUNK * N * 4
    rest = dC + CHUNK * N * 4
    for chunk in range(call.chunks - 1, -1, -1):
        begin = chunk * CHUNK
        end = min(begin + CHUNK, call.length)
        _read_group(call, row, group, begin, end, B, C, kind)
        _clear(dB, CHUNK * N * 2)  # and dC behind it
        for head in range(group * heads, (group + 1) * heads):
            for half in range(call.halves):
                _retreat(call, row, head, half, chunk, begin, end, B, C, dB, dC, rest, kind)
        for token in range(begin, end):
            t = (token - begin) * N * 4
            of_B, of_C = floats(dB + t, N), floats(dC + t, N)
            place = ((row * call.length + token) * call.groups + group) * N * item_size(kind)
            for_B, for_C = items(call.dB + place, N, kind), items(call.dC + place, N, kind)
            for n in range(N):
                for_B[n] = encode(of_B[n], kind)
                for_C[n] = encode(of_C[n], kind)


@njit
def _retreat(call, row, head, half, chunk, begin, end, B, C, dB, dC, rest, kind):
    """Compute the states of a chunk again, then go back through it."""
    N = call.state_size
    size = N * LANES * 4
    place = (row * call.heads + head) * call.halves + half
    slope, states = call.state + place * size, rest
    zeros = states + (CHUNK + 1) * size
    u = zeros + size
    dy = u + CHUNK * LANES * 4
    du = dy + CHUNK * LANES * 4
    _clear(zeros, N * LANES)
    _copy(call.states + (place * call.chunks + chunk) * size, states, N * LANES)
    for token in range(begin, end):
        t = token - begin
        dt, base, less = _decay(call, row, head, token)
        _input(call, row, head, half, token, dt, u + t * LANES * 4, kind)
        before = zeros if _begins_document(call, row, token) else states + t * size
        after = states + (t + 1) * size
        p = t * LANES * 4
        _read(
            call.dy, call.dy_row, call.dy_token, row, token, head, half, call.head_size,
            dy + p, kind,
        )  # fmt: skip
        repeat_lanes(before, after, B + t * N * 4, u + p, dy + p, dC + t * N * 4, base, less, N)
    for token in range(end - 1, begin - 1, -1):
        t = token - begin
        dt, base, less = _decay(call, row, head, token)
        before = states + t * size
        if _begins_document(call, row, token):
            # nothing of the state is left
            before, base, less = zeros, np.float32(0.0), np.float32(0.0)
        p = t * LANES * 4
        through = retreat_lanes(
            before, slope, B + t * N * 4, C + t * N * 4, u + p, dy + p, du, dB + t * N * 4,
            base, less, N,
        )  # fmt: skip
        through *= base + less
        _gradients(call, row, head, half, token, dt, through, dy + p, du, kind)


@njit
def _gradients(call, row, head, half, token, dt, through, dy, du, kind):
    """Write dx, and add to the gradients of dt, A and D; `through` is that of log decay."""
    x = _numbers(call.x, call.x_row, call.x_token, row, token, head, half, call.head_size, kind)
    place = ((row * call.length + token) * call.heads + head) * call.head_size + half * LANES
    target = items(call.dx + place * item_size(kind), LANES, kind)
    slopes, ups = floats(dy, LANES), floats(du, LANES)
    skip, A = floats(call.D, call.heads)[head], floats(call.A, call.heads)[head]
    by_time, by_skip = np.float32(0.0), np.float32(0.0)
    for p in range(LANES):
        number = decode(x[p])
        target[p] = encode(ups[p] * dt + skip * slopes[p], kind)
        by_time += ups[p] * number
        by_skip += slopes[p] * number
    index = (row * call.length + token) * call.heads + head
    floats(call.ddt, index + 1)[index] += by_time + through * A
    sums = call.rows * call.heads
    doubles(call.dA, sums)[row * call.heads + head] += np.float64(through) * np.float64(dt)
    doubles(call.dD, sums)[row * call.heads + head] += np.float64(by_skip)


@njit
def _decay(call, row, head, token):
    """Return a token's time step, and its decay as a base and what is added to it."""
    index = (row * call.length + token) * call.heads + head
    dt = floats(call.dt, index + 1)[index]
    log = dt * floats(call.A, call.heads)[head]
    if log > NEAR_1:
        return dt, np.float32(1.0), expm1(log)
    return dt, np.float32(0.0), exp(log)


@njit
def _begins_document(call, row, token):
    """Say whether the state before a token belongs to another document."""
    if call.ids == 0:
        return False
    index = row * call.length + token
    ids = integers(call.ids, index + 1)
    # what comes before the row belongs to document 0
    return ids[index] != (ids[index - 1] if token else 0)


@njit
def _numbers(address, row_stride, token_stride, row, token, head, half, head_size, kind):
    place = row * row_stride + token * token_stride + head * head_size + half * LANES
    return items(address + place * item_size(kind), LANES, kind)


@njit
def _read(address, row_stride, token_stride, row, token, head, half, head_size, target, kind):
    source = _numbers(address, row_stride, token_stride, row, token, head, half, head_size, kind)
    numbers = floats(target, LANES)
    for p in range(LANES):
        numbers[p] = decode(source[p])


@njit
def _input(call, row, head, half, token, dt, u, kind):
    """Write dt x of 32 numbers."""
    x = _numbers(call.x, call.x_row, call.x_token, row, token, head, half, call.head_size, kind)
    numbers = floats(u, LANES)
    for p in range(LANES):
        numbers[p] = dt * decode(x[p])


@njit
def _read_group(call, row, group, begin, end, B, C, kind):
    """Write B and C of a group's tokens as float32."""
    N = call.state_size
    for token in range(begin, end):
        t = (token - begin) * N * 4
        of_B = row * call.B_row + token * call.B_token + group * N
        of_C = row * call.C_row + token * call.C_token + group * N
        left = items(call.B + of_B * item_size(kind), N, kind)
        right = items(call.C + of_C * item_size(kind), N, kind)
        to_B, to_C = floats(B + t, N), floats(C + t, N)
        for n in range(N):
            to_B[n], to_C[n] = decode(left[n]), decode(right[n])


@njit
def _copy(source, target, count):
    floats(target, count)[:] = floats(source, count)


@njit
def _clear(target, count):
    floats(target, count)[:] = np.float32(0.0)


FIELDS = (
    *("rows", "length", "chunks", "heads", "groups", "head_size", "halves", "state_size"),
    *("x", "x_row", "x_token", "dt", "A", "B", "B_row", "B_token", "C", "C_row", "C_token"),
    *("D", "ids", "state", "states", "y", "dy", "dy_row", "dy_token", "dx", "dB", "dC", "ddt"),
    *("dA", "dD", "scratch", "scratch_size", "counter"),
)
CALL = np.dtype([(name, np.int64) for name in FIELDS])
"""Sizes, addresses, and strides in numbers."""
KERNELS = (forward, backward)
