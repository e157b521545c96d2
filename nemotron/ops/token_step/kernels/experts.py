"""Mixtures of experts: tokens are grouped by expert, so that each chosen matrix is read once."""

import numpy as np
from numba import njit

from nemotron.ops.jit.barrier import wait
from nemotron.ops.jit.scalars import floats, integers, item_size, share
from nemotron.ops.jit.vectors import BLOCK, tile
from nemotron.ops.token_step.kernels.elementwise import apply_sigmoid
from nemotron.ops.token_step.kernels.linear import linear, linear_with_square_relu, normalize_rows


@njit
def mix_experts(call, layer, thread, threads, kind):
    """Add the routed experts' and the shared one's results to the residual stream."""
    tokens = call.rows * call.length
    normalize_rows(call, call.x, layer.norm, layer.eps, thread, threads)
    wait(call.counter, threads)
    linear(
        call.x_rows, call.scores_rows, tokens, layer.router, call.size, layer.router_blocks,
        True, thread, threads, np.float32,
    )  # fmt: skip
    linear_with_square_relu(
        call.x_rows, call.wide_rows, tokens, layer.first, call.size, layer.first_blocks,
        thread, threads, kind,
    )  # fmt: skip
    if layer.to_latent:
        linear(
            call.x_rows, call.latent_rows, tokens, layer.to_latent, call.size, layer.input_blocks,
            True, thread, threads, kind,
        )  # fmt: skip
    wait(call.counter, threads)
    first, last = share(tokens, thread, threads)
    for token in range(first, last):
        _route(call, layer, token)
        if layer.to_latent:
            floats(call.routed + token * call.latent_width * 4, call.latent_width)[:] = np.float32(
                0.0
            )
    wait(call.counter, threads)
    if thread == 0:
        _group(call, layer, tokens)
    wait(call.counter, threads)
    _up(call, layer, tokens, thread, threads, kind)
    wait(call.counter, threads)
    linear(
        call.wide_rows, call.hidden_rows, tokens, layer.last, layer.last_count, layer.last_blocks,
        False, thread, threads, kind,
    )  # fmt: skip
    _down(call, layer, tokens, thread, threads, kind)
    if layer.to_latent:
        wait(call.counter, threads)
        linear(
            call.routed_rows, call.hidden_rows, tokens, layer.from_latent, layer.input_size,
            layer.last_blocks, False, thread, threads, kind,
        )  # fmt: skip


@njit
def _chosen(call, layer):
    """Return where the experts of a layer are noted."""
    return call.chosen + layer.chosen_before * call.rows * call.length * 8


@njit
def _route(call, layer, token):
    """Choose the experts of a token: the bias chooses, the unbiased score weighs."""
    experts, count = layer.num_experts, layer.top_k
    scores = floats(call.scores + token * call.scores_width * 4, experts)
    bias = floats(layer.router_bias, experts)
    chosen = integers(_chosen(call, layer) + token * count * 8, count)
    weights = floats(call.weights + token * count * 4, count)
    apply_sigmoid(call.scores + token * call.scores_width * 4, experts)
    total = np.float32(0.0)
    for place in range(count):
        best, highest = -1, np.float32(-np.inf)
        for expert in range(experts):
            biased = scores[expert] + bias[expert]
            is_taken = False
            for earlier in range(place):
                is_taken |= chosen[earlier] == expert
            if not is_taken and (best < 0 or biased > highest):
                best, highest = expert, biased
        chosen[place], weights[place] = best, scores[best]
        total += scores[best]
    for place in range(count):
        if layer.normalize:
            weights[place] = weights[place] / (total + np.float32(1e-20))
        weights[place] = weights[place] * layer.scaling


@njit
def _group(call, layer, tokens):
    """List the copies of each expert in the order of the tokens, by the addresses of their rows."""
    copies = tokens * layer.top_k
    chosen, order = integers(_chosen(call, layer), copies), integers(call.order, copies)
    begins = integers(call.order + copies * 8, layer.num_experts + 1)
    begins[:] = 0
    for copy in range(copies):
        begins[chosen[copy] + 1] += 1
    for expert in range(layer.num_experts):
        begins[expert + 1] += begins[expert]
    sources = integers(call.lists, copies)
    middles = integers(call.lists + copies * 8, copies)
    targets = integers(call.lists + copies * 16, copies)
    rows = call.latent_rows if layer.to_latent else call.x_rows
    results = call.routed_rows if layer.to_latent else call.hidden_rows
    inputs, outputs = integers(rows, tokens), integers(results, tokens)
    for copy in range(copies):
        place = begins[chosen[copy]]
        begins[chosen[copy]] = place + 1
        order[place] = copy
        sources[place] = inputs[copy // layer.top_k]
        middles[place] = call.copies + copy * call.copies_width * 4
        targets[place] = outputs[copy // layer.top_k]
    for expert in range(layer.num_experts, 0, -1):
        begins[expert] = begins[expert - 1]
    begins[0] = 0


@njit
def _up(call, layer, tokens, thread, threads, kind):
    """Compute weight · relu(up x)^2; threads share the blocks of all chosen experts."""
    copies = tokens * layer.top_k
    order, weights = integers(call.order, copies), floats(call.weights, copies)
    begins = integers(call.order + copies * 8, layer.num_experts + 1)
    active = 0
    for expert in range(layer.num_experts):
        active += begins[expert + 1] > begins[expert]
    first, last = share(active * layer.expert_blocks, thread, threads)
    size = layer.input_size * BLOCK * item_size(kind)
    item = 0
    for block in range(layer.expert_blocks):  # experts have unlike numbers of tokens
        for expert in range(layer.num_experts):
            begin, end = begins[expert], begins[expert + 1]
            if begin == end:
                continue
            if first <= item < last:
                weight = layer.up + (expert * layer.expert_blocks + block) * size
                tile(
                    call.lists + begin * 8, call.lists + (copies + begin) * 8, end - begin,
                    block * BLOCK * 4, weight, layer.input_size, True, kind,
                )  # fmt: skip
                for place in range(begin, end):
                    copy = order[place]
                    offset = (copy * call.copies_width + block * BLOCK) * 4
                    hidden = floats(call.copies + offset, BLOCK)
                    for i in range(BLOCK):
                        positive = max(hidden[i], np.float32(0.0))
                        hidden[i] = positive * positive * weights[copy]
            item += 1


@njit
def _down(call, layer, tokens, thread, threads, kind):
    """Add up each token's experts in ascending order; threads share the blocks of outputs."""
    copies = tokens * layer.top_k
    begins = integers(call.order + copies * 8, layer.num_experts + 1)
    blocks = layer.input_blocks
    size = layer.expert_size * BLOCK * item_size(kind)
    first, last = share(blocks, thread, threads)
    for expert in range(layer.num_experts):
        begin, end = begins[expert], begins[expert + 1]
        if begin == end:
            continue
        for block in range(first, last):
            weight = layer.down + (expert * blocks + block) * size
            tile(
                call.lists + (copies + begin) * 8, call.lists + (2 * copies + begin) * 8,
                end - begin, block * BLOCK * 4, weight, layer.expert_size, False, kind,
            )  # fmt: skip
