"""The scan in short chunks, as products of small matrices that stay in a core's cache.

A unit is a group of heads of a row: B and C are read once for its heads, and their gradients are
added up in the order of the heads, so no bit depends on the number of threads. Matrices lie in
strips of 16 columns, [columns / 16, rows, 16]; a state is one of [head size, N].

With the decay D[i, j] of token j's input up to token i, and `since` from the chunk's beginning up
to a token, a head's outputs are y_i = since_i S C_i + sum_j (C_i · B_j) D[i, j] dt_j x_j + D x_i.
Where a number for each token is added up, tokens are lanes, so that no sum is across lanes.
Source: Mamba-2 (Dao & Gu 2024), section 6.
"""

import numpy as np
from numba import njit

from nemotron.ops.jit.barrier import wait
from nemotron.ops.jit.lanes import (
    first_lanes,
    fma,
    load,
    one_at,
    read,
    splat,
    store,
    total,
    write,
    zeros,
)
from nemotron.ops.jit.scalars import doubles, exp, expm1, floats, integers, item_size, items, share
from nemotron.ops.jit.strips import ROW, multiply, multiply_transposed, scale_rows, transpose
from nemotron.ops.jit.vectors import LANES

STRIPS = 2
CHUNK = STRIPS * LANES
"""Tokens of a chunk; the last one is filled up with tokens that change nothing."""
TOKENS = 4 * CHUNK
"""Bytes of a number for each token of a chunk."""
VECTORS = 9
"""Such numbers that a head has."""

NEAR_1 = np.float32(-0.5)
"""Logarithm of the decays that are closer to 1 than to 0."""


def forward_numbers(head_size, N, heads):
    """Return how many numbers of scratch a thread needs to go forward through a group's heads."""
    return heads * head_size * N + CHUNK * (3 * N + 3 * CHUNK + 3 * head_size + VECTORS)


def backward_numbers(head_size, N, heads):
    """Return how many numbers of scratch a thread needs to go back through a group's heads."""
    return heads * head_size * N + CHUNK * (7 * N + 5 * CHUNK + 6 * head_size + VECTORS)


@njit(nogil=True, cache=True)
def forward(address, thread, threads, kind):
    """Fill y, the states at the beginning of each chunk and the last one; `first` may be 0."""
    call = items(address, 1, CALL)[0]
    begin, end = share(call.rows * call.groups, thread, threads)
    scratch = call.scratch + thread * call.scratch_size
    for unit in range(begin, end):
        _forward(call, unit // call.groups, unit % call.groups, scratch, kind)
    wait(call.counter, threads)


@njit
def _forward(call, row, group, scratch, kind):
    N, P, heads = call.state_size, call.head_size, call.heads // call.groups
    size = P * N * 4
    B = scratch + heads * size
    B_columns = B + N * TOKENS
    C_columns = B_columns + N * TOKENS
    G = C_columns + N * TOKENS
    D = G + CHUNK * TOKENS
    M = D + CHUNK * TOKENS
    x = M + CHUNK * TOKENS
    y = x + P * TOKENS
    y_columns = y + P * TOKENS
    vectors = y_columns + P * TOKENS
    dts, since = vectors, vectors + 3 * TOKENS
    own = (row * call.heads + group * heads) * size
    for head in range(heads):
        _read_state(call.first, own + head * size, P, N, scratch + head * size)
    for chunk in range(call.chunks):
        begin = chunk * CHUNK
        count = min(CHUNK, call.length - begin)
        source = _place(call.C, call.C_row, call.C_token, row, begin, group, N, kind)
        _read(source, call.C_token, count, N, B, kind)
        _transpose(B, CHUNK, N, C_columns)
        source = _place(call.B, call.B_row, call.B_token, row, begin, group, N, kind)
        _read(source, call.B_token, count, N, B, kind)
        _transpose(B, CHUNK, N, B_columns)
        _lower(C_columns, B_columns, N, G)
        for head in range(group * heads, (group + 1) * heads):
            place = row * call.heads + head
            state = scratch + head % heads * size
            before = call.states + (place * call.chunks + chunk) * size
            base, less = _decays(call, row, head, begin, count, vectors, D)
            source = _place(call.x, call.x_row, call.x_token, row, begin, head, P, kind)
            _read(source, call.x_token, count, P, x, kind)
            bases, falls = splat(base), splat(less)
            for at in range(0, size, ROW):
                old = load(state + at)
                store(before + at, old)
                store(state + at, fma(falls, old, bases * old))
            for strip in range(STRIPS):
                dt = load(dts + strip * ROW)
                for i in range(strip * LANES, CHUNK):
                    at = (strip * CHUNK + i) * ROW
                    store(M + at, load(G + at) * load(D + at) * dt)
            _multiply(before, P, N, C_columns, CHUNK, y_columns, True)
            for strip in range(STRIPS):
                scale_rows(y_columns + strip * P * ROW, since + strip * ROW, P)
            _transpose(y_columns, P, CHUNK, y)
            _multiply_lower(M, x, P, y)
            tokens = call.heads * P
            target = _place(call.y, call.length * tokens, tokens, row, begin, head, P, kind)
            _output(call, head, count, x, y, vectors, target, kind)
            _multiply_transposed(x, CHUNK, P, B, N, state, False)
    for head in range(heads):
        _write_state(scratch + head * size, P, N, call.last, own + head * size)


@njit
def _read_state(source, offset, P, N, target):
    """Write a state [P, N] in strips; where there is none, zeros."""
    for p in range(P):
        for strip in range(N // LANES):
            at = target + (strip * P + p) * ROW
            if source:
                store(at, load(source + offset + (p * N + strip * LANES) * 4))
            else:
                store(at, zeros())


@njit
def _write_state(source, P, N, target, offset):
    """Write a state's strips as [P, N], where that is wanted."""
    if target:
        for p in range(P):
            for strip in range(N // LANES):
                place = target + offset + (p * N + strip * LANES) * 4
                store(place, load(source + (strip * P + p) * ROW))


@njit
def _output(call, head, count, x, y, vectors, target, kind):
    """Write y + D x, and weigh x with what is left of it at the end of the chunk."""
    P = call.head_size
    skip = splat(floats(call.D, call.heads)[head])
    dts, until = floats(vectors, CHUNK), floats(vectors + 4 * TOKENS, CHUNK)
    for t in range(count):
        left = splat(dts[t] * until[t])
        for strip in range(P // LANES):
            at = (strip * CHUNK + t) * ROW
            number = load(x + at)
            place = target + (t * call.heads * P + strip * LANES) * item_size(kind)
            write(place, fma(skip, number, load(y + at)), kind)
            store(x + at, left * number)


@njit(nogil=True, cache=True)
def backward(address, thread, threads, kind):
    """Fill dx, dB, dC and ddt, and add up dA and dD.

    `last` is the last state's gradient, or 0; that of the first one is written where it is wanted.
    """
    call = items(address, 1, CALL)[0]
    begin, end = share(call.rows * call.groups, thread, threads)
    scratch = call.scratch + thread * call.scratch_size
    for unit in range(begin, end):
        _backward(call, unit // call.groups, unit % call.groups, scratch, kind)
    wait(call.counter, threads)


@njit
def _backward(call, row, group, scratch, kind):
    N, P, heads = call.state_size, call.head_size, call.heads // call.groups
    size = P * N * 4
    B = scratch + heads * size
    C = B + N * TOKENS
    B_columns = C + N * TOKENS
    C_columns = B_columns + N * TOKENS
    dB = C_columns + N * TOKENS
    dC_columns = dB + N * TOKENS
    dC = dC_columns + N * TOKENS
    G = dC + N * TOKENS
    dG = G + CHUNK * TOKENS
    rest = dG + CHUNK * TOKENS
    own = (row * call.heads + group * heads) * size
    for head in range(heads):
        _read_state(call.last, own + head * size, P, N, scratch + head * size)
    for chunk in range(call.chunks - 1, -1, -1):
        begin = chunk * CHUNK
        count = min(CHUNK, call.length - begin)
        source = _place(call.B, call.B_row, call.B_token, row, begin, group, N, kind)
        _read(source, call.B_token, count, N, B, kind)
        _transpose(B, CHUNK, N, B_columns)
        source = _place(call.C, call.C_row, call.C_token, row, begin, group, N, kind)
        _read(source, call.C_token, count, N, C, kind)
        _transpose(C, CHUNK, N, C_columns)
        _lower(C_columns, B_columns, N, G)
        _clear(dB, 2 * CHUNK * N)  # and dC_columns behind it
        _clear(dG, CHUNK * CHUNK)
        for head in range(group * heads, (group + 1) * heads):
            slope = scratch + head % heads * size
            _retreat(call, row, head, chunk, slope, C, B_columns, C_columns, dB, dC_columns, dC, G,
                     dG, rest, kind)  # fmt: skip
        _transpose(dC_columns, N, CHUNK, dC)
        _multiply_lower(dG, B, N, dC)
        for strip in range(N // LANES):
            for block in range(STRIPS):
                down = (strip * CHUNK + block * LANES) * ROW
                left = dG + (block * CHUNK + block * LANES) * ROW
                deep = CHUNK - block * LANES
                multiply_transposed(left, 0, 1, C + down, deep, dB + down, False)
        tokens = call.groups * N
        target = _place(call.dB, call.length * tokens, tokens, row, begin, group, N, kind)
        _write(dB, tokens, count, N, target, kind)
        target = _place(call.dC, call.length * tokens, tokens, row, begin, group, N, kind)
        _write(dC, tokens, count, N, target, kind)
    for head in range(heads):
        _write_state(scratch + head * size, P, N, call.first, own + head * size)


@njit
def _retreat(
    call, row, head, chunk, slope, C, B_columns, C_columns, dB, dC_columns, dC, G, dG, rest, kind
):
    """Go back through a chunk of a head; `slope` is its state's gradient, `dC` room for a part."""
    N, P = call.state_size, call.head_size
    D = rest
    K = D + CHUNK * TOKENS
    M = K + CHUNK * TOKENS
    x = M + CHUNK * TOKENS
    x_columns = x + P * TOKENS
    dy_columns = x_columns + P * TOKENS
    dy_since = dy_columns + P * TOKENS
    inputs = dy_since + P * TOKENS
    dx_columns = inputs + P * TOKENS
    vectors = dx_columns + P * TOKENS
    by_input, by_end, by_begin, logs = (
        vectors + 5 * TOKENS,
        vectors + 6 * TOKENS,
        vectors + 7 * TOKENS,
        vectors + 8 * TOKENS,
    )
    place = row * call.heads + head
    before = call.states + (place * call.chunks + chunk) * P * N * 4
    begin = chunk * CHUNK
    count = min(CHUNK, call.length - begin)

    base, less = _decays(call, row, head, begin, count, vectors, D)
    source = _place(call.dy, call.dy_row, call.dy_token, row, begin, head, P, kind)
    _read(source, call.dy_token, count, P, x, kind)
    _transpose(x, CHUNK, P, dy_columns)
    source = _place(call.x, call.x_row, call.x_token, row, begin, head, P, kind)
    _read(source, call.x_token, count, P, x, kind)
    _transpose(x, CHUNK, P, x_columns)

    # within the chunk
    _lower(dy_columns, x_columns, P, K)
    _within(G, D, K, M, dG, vectors, by_input)
    _sum_rows(K, D, logs)

    # through the states at its end and its beginning
    _multiply(slope, P, N, B_columns, CHUNK, dx_columns, True)
    _weigh(call, row, head, x_columns, dy_columns, dy_since, inputs, dx_columns, vectors, by_end)
    _multiply_transposed(inputs, P, CHUNK, slope, N, dB, False)
    _multiply_transposed(before, P, N, dy_since, CHUNK, dC, True)
    for strip in range(STRIPS):
        inner = zeros()
        for at in range(strip * N * ROW, (strip + 1) * N * ROW, ROW):
            part = load(dC + at)
            inner = fma(load(C_columns + at), part, inner)
            store(dC_columns + at, load(dC_columns + at) + part)
        store(by_begin + strip * ROW, inner)
    through = _fall(slope, before, base, less, P * N) * (base + less)
    _multiply(dy_since, P, CHUNK, C, N, slope, False)

    for strip in range(STRIPS):
        multiply(dy_columns + strip * P * ROW, P * ROW, STRIPS - strip,
                 M + (strip * CHUNK + strip * LANES) * ROW, dx_columns + strip * P * ROW, P,
                 False)  # fmt: skip
    _transpose(dx_columns, P, CHUNK, x)
    tokens = call.heads * P
    target = _place(call.dx, call.length * tokens, tokens, row, begin, head, P, kind)
    _write(x, tokens, count, P, target, kind)
    _times(call, row, head, begin, count, through, vectors)


@njit
def _within(G, D, K, M, dG, vectors, by_input):
    """Take `K`, the slopes of M = G D dt, back to G and the time steps.

    Row i of `K` becomes the parts of the gradient of token i's log decay, by tokens before it.
    """
    for strip in range(STRIPS):
        dt = load(vectors + strip * ROW)
        inner = zeros()
        for i in range(CHUNK - 1, strip * LANES - 1, -1):
            at = (strip * CHUNK + i) * ROW
            slope, decay = load(K + at), load(D + at)
            weight = load(G + at) * decay
            store(M + at, weight * dt)
            store(dG + at, fma(slope * decay, dt, load(dG + at)))
            inner = fma(slope, weight, inner)
            store(K + at, first_lanes(inner * dt, i - strip * LANES))
        store(by_input + strip * ROW, inner)


@njit
def _sum_rows(K, room, sums):
    """Write the sum of each row of a lower triangle."""
    for block in range(STRIPS):
        rows = K + block * LANES * ROW
        for at in range(0, LANES * ROW, ROW):
            row = load(rows + at)
            for strip in range(1, block + 1):
                row = row + load(rows + strip * CHUNK * ROW + at)
            store(rows + at, row)
        transpose(rows, room)
        added = zeros()
        for at in range(0, LANES * ROW, ROW):
            added = added + load(room + at)
        store(sums + block * ROW, added)


@njit
def _weigh(call, row, head, x, dy, dy_since, inputs, dx, vectors, by_end):
    """Finish the gradient of x by the last state and D, and weigh x and dy for the states.

    All have tokens as columns; `dx` is the slope of the last state times B.
    """
    P = call.head_size
    skip, by_skip = splat(floats(call.D, call.heads)[head]), zeros()
    for strip in range(STRIPS):
        dt, since, until = (
            load(vectors + strip * ROW),
            load(vectors + 3 * TOKENS + strip * ROW),
            load(vectors + 4 * TOKENS + strip * ROW),
        )
        left, inner = dt * until, zeros()
        for at in range(strip * P * ROW, (strip + 1) * P * ROW, ROW):
            number, up = load(x + at), load(dy + at)
            came = load(dx + at) * until
            inner = fma(came, number, inner)
            by_skip = fma(up, number, by_skip)
            store(dx + at, fma(came, dt, skip * up))
            store(inputs + at, left * number)
            store(dy_since + at, since * up)
        store(by_end + strip * ROW, inner)
    sums = call.rows * call.heads
    doubles(call.dD, sums)[row * call.heads + head] += np.float64(total(by_skip))


@njit
def _fall(slope, state, base, less, count):
    """Let a state's gradient fall by its decay; return the sum of its products with the state."""
    bases, falls = splat(base), splat(less)
    even, odd = zeros(), zeros()
    for at in range(0, count * 4, 2 * ROW):
        one, two = load(slope + at), load(slope + at + ROW)
        even = fma(one, load(state + at), even)
        odd = fma(two, load(state + at + ROW), odd)
        store(slope + at, fma(falls, one, bases * one))
        store(slope + at + ROW, fma(falls, two, bases * two))
    return total(even + odd)


@njit
def _times(call, row, head, begin, count, through, vectors):
    """Write the gradients of the time steps, and add to that of A."""
    dts, by_input, by_end, by_begin, logs = (
        floats(vectors, CHUNK),
        floats(vectors + 5 * TOKENS, CHUNK),
        floats(vectors + 6 * TOKENS, CHUNK),
        floats(vectors + 7 * TOKENS, CHUNK),
        floats(vectors + 8 * TOKENS, CHUNK),
    )
    after = np.float32(0.0)
    for t in range(count - 1, -1, -1):
        after += by_begin[t]
        logs[t] += after
    A, inner = floats(call.A, call.heads)[head], np.float64(0.0)
    index = (row * call.length + begin) * call.heads + head
    ddt = floats(call.ddt, index + count * call.heads)
    for t in range(count):
        log = logs[t] + through
        through += by_end[t] * dts[t]
        ddt[index + t * call.heads] = by_input[t] + by_end[t] + log * A
        inner += np.float64(log) * np.float64(dts[t])
    sums = call.rows * call.heads
    doubles(call.dA, sums)[row * call.heads + head] += inner


@njit
def _decays(call, row, head, begin, count, vectors, D):
    """Fill D, and a head's numbers for each token; return the whole chunk's decay.

    A decay is a base and what is added to it: 1 and what it is less than that, or 0 and itself. The
    numbers are: dt, base, less, the decay since the beginning, and that until the end.
    """
    dts, bases, falls, since = (
        floats(vectors, CHUNK),
        floats(vectors + TOKENS, CHUNK),
        floats(vectors + 2 * TOKENS, CHUNK),
        floats(vectors + 3 * TOKENS, CHUNK),
    )
    A = floats(call.A, call.heads)[head]
    index = (row * call.length + begin) * call.heads + head
    steps = floats(call.dt, index + count * call.heads)
    logs, is_cut, decay = np.float64(0.0), False, np.float32(1.0)
    for t in range(CHUNK):
        dt, base, less = np.float32(0.0), np.float32(1.0), np.float32(0.0)
        if t < count:
            dt = steps[index + t * call.heads]
            log = dt * A
            base, less = _split(log)
            logs += np.float64(log)
            if _begins_document(call, row, begin + t):
                is_cut, base, less = True, np.float32(0.0), np.float32(0.0)
        decay = decay * base + decay * less
        dts[t], bases[t], falls[t], since[t] = dt, base, less, decay
    for strip in range(STRIPS):
        left = zeros()
        for i in range(strip * LANES, CHUNK):
            own = fma(splat(bases[i]), left, one_at(i - strip * LANES))
            left = fma(splat(falls[i]), left, own)
            store(D + (strip * CHUNK + i) * ROW, left)
        store(vectors + 4 * TOKENS + strip * ROW, left)
    if is_cut:
        return np.float32(0.0), np.float32(0.0)
    return _split(np.float32(logs))


@njit
def _split(log):
    """Return a decay as a base and what is added to it."""
    if log > NEAR_1:
        return np.float32(1.0), expm1(log)
    return np.float32(0.0), exp(log)


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
def _place(address, row_stride, token_stride, row, token, index, width, kind):
    """Return the address of a head's or group's numbers of a token."""
    return address + (row * row_stride + token * token_stride + index * width) * item_size(kind)


@njit
def _read(source, stride, count, width, target, kind):
    """Write the numbers of a chunk's tokens as [CHUNK, width], with 0 behind the last one."""
    for strip in range(width // LANES):
        for t in range(CHUNK):
            at = target + (strip * CHUNK + t) * ROW
            if t < count:
                store(at, read(source + (t * stride + strip * LANES) * item_size(kind), kind))
            else:
                store(at, zeros())


@njit
def _write(source, stride, count, width, target, kind):
    """Write [CHUNK, width] as the numbers of some tokens."""
    for strip in range(width // LANES):
        for t in range(count):
            place = target + (t * stride + strip * LANES) * item_size(kind)
            write(place, load(source + (strip * CHUNK + t) * ROW), kind)


@njit
def _transpose(source, rows, columns, target):
    for strip in range(columns // LANES):
        for block in range(rows // LANES):
            transpose(source + (strip * rows + block * LANES) * ROW,
                      target + (block * columns + strip * LANES) * ROW)  # fmt: skip


@njit
def _multiply(a, rows, inner, b, columns, c, fresh):
    """C (+)= A B, of [rows, inner] and [inner, columns]."""
    for strip in range(columns // LANES):
        multiply(a, rows * ROW, inner // LANES, b + strip * inner * ROW, c + strip * rows * ROW,
                 rows, fresh)  # fmt: skip


@njit
def _multiply_transposed(a, depth, rows, b, columns, c, fresh):
    """C (+)= A^T B, of [depth, rows] and [depth, columns]."""
    for strip in range(columns // LANES):
        multiply_transposed(a, depth * ROW, rows // LANES, b + strip * depth * ROW, depth,
                            c + strip * rows * ROW, fresh)  # fmt: skip


@njit
def _lower(a, b, depth, c):
    """C = A^T B for [depth, CHUNK], without the blocks above the diagonal."""
    for strip in range(STRIPS):
        multiply_transposed(a + strip * depth * ROW, depth * ROW, STRIPS - strip,
                            b + strip * depth * ROW, depth,
                            c + (strip * CHUNK + strip * LANES) * ROW, True)  # fmt: skip


@njit
def _multiply_lower(a, b, columns, c):
    """C += A B for a lower triangle A and B of [CHUNK, columns]."""
    for strip in range(columns // LANES):
        for block in range(STRIPS):
            down = block * LANES * ROW
            multiply(a + down, CHUNK * ROW, block + 1, b + strip * CHUNK * ROW,
                     c + strip * CHUNK * ROW + down, LANES, False)  # fmt: skip


@njit
def _clear(target, count):
    floats(target, count)[:] = np.float32(0.0)


FIELDS = (
    *("rows", "length", "chunks", "heads", "groups", "head_size", "state_size"),
    *("x", "x_row", "x_token", "dt", "A", "B", "B_row", "B_token", "C", "C_row", "C_token"),
    *(
        "D",
        "ids",
        "first",
        "last",
        "states",
        "y",
        "dy",
        "dy_row",
        "dy_token",
        "dx",
        "dB",
        "dC",
        "ddt",
    ),
    *("dA", "dD", "scratch", "scratch_size", "counter"),
)
CALL = np.dtype([(name, np.int64) for name in FIELDS])
"""Sizes, addresses, and strides in numbers."""
KERNELS = (forward, backward)
