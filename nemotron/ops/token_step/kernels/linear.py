"""Norms and matrix products of a few tokens; threads share the blocks of outputs."""

import math

import numpy as np
from numba import njit

from nemotron.ops.jit.barrier import wait
from nemotron.ops.jit.scalars import decode, encode, floats, integers, item_size, share
from nemotron.ops.jit.vectors import BLOCK, dot, tile
from nemotron.ops.token_step.kernels.elementwise import copy_bytes


@njit
def linear(xs, ys, rows, weight, count, blocks, fresh, thread, threads, kind, skipped=0):
    """y (+)= x W for rows at the addresses in `xs` and `ys`; W is [blocks, count, 64].

    The first `skipped` blocks of y stay as they are.
    """
    first, last = share(blocks - skipped, thread, threads)
    for block in range(skipped + first, skipped + last):
        begin = weight + block * count * BLOCK * item_size(kind)
        tile(xs, ys, rows, block * BLOCK * 4, begin, count, fresh, kind)


@njit
def square_relu(address, count):
    """x <- relu(x)^2."""
    x = floats(address, count)
    for i in range(count):
        positive = max(x[i], np.float32(0.0))
        x[i] = positive * positive


@njit
def linear_in_parts(xs, ys, rows, weight, count, ends, blocks, thread, threads, kind):
    """As a fresh `linear`, where threads share each part of the outputs, up to its end, alike.

    A thread that later reads its share of every part then finds it in its own cache.
    """
    begin = 0
    for part in range(len(ends) + 1):
        end = blocks if part == len(ends) else min(blocks, (ends[part] + BLOCK - 1) // BLOCK)
        first, last = share(end - begin, thread, threads)
        for block in range(begin + first, begin + last):
            address = weight + block * count * BLOCK * item_size(kind)
            tile(xs, ys, rows, block * BLOCK * 4, address, count, True, kind)
        begin = end


@njit
def linear_with_square_relu(xs, ys, rows, weight, count, blocks, thread, threads, kind):
    """y = relu(x W)^2, as `linear`."""
    first, last = share(blocks, thread, threads)
    targets = integers(ys, rows)
    for block in range(first, last):
        begin = weight + block * count * BLOCK * item_size(kind)
        tile(xs, ys, rows, block * BLOCK * 4, begin, count, True, kind)
        for row in range(rows):
            square_relu(targets[row] + block * BLOCK * 4, BLOCK)


@njit
def normalize(source, target, size, width, weight, eps):
    """Scale a row to unit root mean square, then by `weight`; both are 0 beyond `size`."""
    scale = np.float32(1.0) / np.float32(
        math.sqrt(dot(source, source, width, np.float32) / np.float32(size) + eps)
    )
    x, y, gain = floats(source, width), floats(target, width), floats(weight, width)
    for i in range(width):
        y[i] = x[i] * scale * gain[i]


@njit
def normalize_rows(call, target, weight, eps, thread, threads):
    """Normalize this thread's share of the residual stream's rows."""
    first, last = share(call.rows * call.length, thread, threads)
    for row in range(first, last):
        offset = row * call.width * 4
        normalize(call.hidden + offset, target + offset, call.size, call.width, weight, eps)


@njit
def embed(call, tokens, thread, threads, kind):
    """Look up this thread's share of the tokens, rounded as the model's activations are."""
    first, last = share(call.rows * call.length, thread, threads)
    for row in range(first, last):
        source = floats(call.embeddings + tokens[row] * call.size * 4, call.size)
        target = floats(call.hidden + row * call.width * 4, call.size)
        for i in range(call.size):
            target[i] = decode(encode(source[i], kind))


@njit
def join(call, thread, threads, kind):
    """Replace the embeddings by their product with what is given, both normalized."""
    first, last = share(call.rows * call.length, thread, threads)
    for row in range(first, last):
        hidden, x = call.hidden + row * call.width * 4, call.x + row * call.width * 4
        both = call.wide + row * call.wide_width * 4
        copy_bytes(x, call.given + row * call.size * 4, call.size * 4)
        normalize(hidden, both, call.size, call.width, call.embedding_norm, call.join_eps)
        second = both + call.size * 4
        normalize(x, second, call.size, call.width, call.hidden_norm, call.join_eps)
    wait(call.counter, threads)
    linear(
        call.wide_rows, call.hidden_rows, call.rows * call.length, call.proj, 2 * call.size,
        call.width // BLOCK, True, thread, threads, kind,
    )  # fmt: skip
    wait(call.counter, threads)
