"""The choice of experts and the order of their rows, each in one pass; all numbers are float32.

A unit is a token, or a block of a row's tokens whose sums are added up in the order of the blocks,
so no bit depends on the number of threads. The order is a counting sort by a single thread.
"""

import numpy as np
from numba import carray, njit

from nemotron.ops.jit.barrier import wait
from nemotron.ops.jit.lanes import read_some, sigmoid, write_some
from nemotron.ops.jit.scalars import _pointer, floats, integers, items, share
from nemotron.ops.jit.vectors import LANES

TOKENS = 128
"""Of a block."""
F32 = np.float32
NONE = np.float32(0.0)
ONE = np.float32(1.0)
TINY = np.float32(1e-20)


@njit(nogil=True, cache=True)
def choose(address, thread, threads, kind):
    """Fill scores, experts, weights, and each thread's counts of tokens."""
    call = items(address, 1, CALL)[0]
    E, K = call.num_experts, call.top_k
    biased = call.scratch + thread * call.scratch_size
    counts = integers(call.counts + thread * E * 8, E)
    bias = floats(call.bias, E)
    first, last = share(call.tokens, thread, threads)
    for token in range(first, last):
        logits, place = call.logits + token * E * 4, call.scores + token * E * 4
        for e in range(0, E, LANES):
            write_some(place + e * 4, sigmoid(read_some(logits + e * 4, E - e, F32)), E - e, F32)
        scores, experts = floats(place, E), integers(call.experts + token * K * 8, K)
        if call.given:
            experts[:] = integers(call.given + token * K * 8, K)
        else:
            values = floats(biased, E)
            for e in range(E):
                values[e] = scores[e] + bias[e]
            _take_best(values, experts, floats(biased + E * 4, K))
        weights = floats(call.weights + token * K * 4, K)
        total = ONE
        if call.normalize:
            total = TINY
            for k in range(K):
                total += scores[experts[k]]
        for k in range(K):
            weights[k] = scores[experts[k]] / total * np.float32(call.scaling)
            counts[experts[k]] += 1
    wait(call.counter, threads)


@njit
def _take_best(values, chosen, best):
    """Write the places of the largest values in descending order; of equals, the first ones.

    What is no number counts as infinite, as torch orders it.
    """
    K = len(chosen)
    for e in range(len(values)):
        value = values[e] if values[e] == values[e] else np.float32(np.inf)
        if e >= K and not value > best[K - 1]:
            continue
        k = min(e, K - 1)
        while k > 0 and value > best[k - 1]:
            best[k], chosen[k] = best[k - 1], chosen[k - 1]
            k -= 1
        best[k], chosen[k] = value, e


@njit(nogil=True, cache=True)
def choose_backward(address, thread, threads, kind):
    """Fill the gradient of the logits from those of weights and scores, each of which may be 0."""
    call = items(address, 1, CALL)[0]
    E, K = call.num_experts, call.top_k
    scaling = np.float32(call.scaling)
    first, last = share(call.tokens, thread, threads)
    for token in range(first, last):
        scores = floats(call.scores + token * E * 4, E)
        slopes = floats(call.dlogits + token * E * 4, E)
        if call.dscores:
            slopes[:] = floats(call.dscores + token * E * 4, E)
        else:
            slopes[:] = NONE
        if call.dweights:
            experts = integers(call.experts + token * K * 8, K)
            by_weight = floats(call.dweights + token * K * 4, K)
            total, inner = ONE, NONE
            if call.normalize:
                total = TINY
                for k in range(K):
                    total += scores[experts[k]]
                    inner += by_weight[k] * scores[experts[k]]
                inner /= total
            for k in range(K):
                slopes[experts[k]] += (by_weight[k] - inner) * scaling / total
        for e in range(E):
            slopes[e] *= scores[e] * (ONE - scores[e])
    wait(call.counter, threads)


@njit(nogil=True, cache=True)
def balance(address, thread, threads, kind):
    """Fill the sums of the shares of each block of tokens, and how often an expert is chosen."""
    call = items(address, 1, CALL)[0]
    E, K = call.num_experts, call.top_k
    place = call.scratch + thread * call.scratch_size
    shares, best, chosen = floats(place, E), floats(place + E * 4, K), np.empty(K, np.int64)
    first, last = share(call.rows * call.blocks, thread, threads)
    for unit in range(first, last):
        sums, load = floats(call.sums + unit * E * 4, E), floats(call.load + unit * E * 4, E)
        sums[:], load[:] = NONE, NONE
        row, begin = unit // call.blocks, unit % call.blocks * TOKENS
        for token in range(begin, min(begin + TOKENS, call.length)):
            token += row * call.length
            if _is_padding(call, token):
                continue
            scores = floats(call.scores + token * E * 4, E)
            total = _total(scores)
            for e in range(E):
                shares[e] = scores[e] / total
                sums[e] += shares[e]
            _take_best(shares, chosen, best)
            for k in range(K):
                load[chosen[k]] += ONE
    wait(call.counter, threads)


@njit
def _is_padding(call, token):
    return call.padding and carray(_pointer(call.padding), token + 1, np.uint8)[token]


@njit
def _total(scores):
    total = TINY
    for e in range(len(scores)):
        total += scores[e]
    return total


@njit(nogil=True, cache=True)
def balance_backward(address, thread, threads, kind):
    """Fill the gradient of the scores from that of each row's sums of shares."""
    call = items(address, 1, CALL)[0]
    E = call.num_experts
    first, last = share(call.tokens, thread, threads)
    for token in range(first, last):
        scores = floats(call.scores + token * E * 4, E)
        slopes = floats(call.dscores + token * E * 4, E)
        if _is_padding(call, token):
            slopes[:] = NONE
            continue
        by_sum = floats(call.dsums + token // call.length * E * 4, E)
        total, inner = _total(scores), NONE
        for e in range(E):
            inner += by_sum[e] * scores[e]
        inner /= total
        for e in range(E):
            slopes[e] = (by_sum[e] - inner) / total
    wait(call.counter, threads)


@njit(nogil=True, cache=True)
def order(address, thread, threads, kind):
    """Fill the token of each row, the row of each copy, and where each token's copies begin.

    `heads` is the first row of each expert, and is counted up.
    """
    call = items(address, 1, CALL)[0]
    if thread == 0:
        copies = call.copies
        experts, token = integers(call.experts, copies), integers(call.token, copies)
        heads, ordered = integers(call.heads, call.num_experts), integers(call.ordered, call.size)
        place, starts = integers(call.place, copies), integers(call.starts, call.tokens)
        ordered[:] = 0
        seen = 0
        for copy in range(copies):
            while seen < call.tokens and seen <= token[copy]:
                starts[seen] = copy
                seen += 1
            row = heads[experts[copy]]
            heads[experts[copy]] = row + 1
            ordered[row], place[copy] = token[copy], row
        starts[seen:] = copies
    wait(call.counter, threads)


FIELDS = (
    *("tokens", "num_experts", "top_k", "normalize", "logits", "bias", "given", "scores"),
    *("experts", "weights", "counts", "dweights", "dscores", "dlogits"),
    *("rows", "length", "blocks", "padding", "sums", "load", "dsums"),
    *("copies", "size", "token", "heads", "ordered", "place", "starts"),
    *("scratch", "scratch_size", "counter"),
)
CALL = np.dtype([(name, np.int64) for name in FIELDS] + [("scaling", np.float64)])
"""Sizes and addresses; the experts of `order` are those of copies."""
KERNELS = (choose, choose_backward, balance, balance_backward, order)
