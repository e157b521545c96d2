"""A step through all layers: one call, in which threads wait for each other between the parts."""

from numba import njit

from nemotron.ops.jit.barrier import wait
from nemotron.ops.jit.scalars import integers, items
from nemotron.ops.jit.vectors import BLOCK
from nemotron.ops.token_step.kernels import records
from nemotron.ops.token_step.kernels.attention import attend, store
from nemotron.ops.token_step.kernels.experts import mix_experts
from nemotron.ops.token_step.kernels.linear import (
    embed,
    join,
    linear,
    linear_in_parts,
    linear_with_square_relu,
    normalize_rows,
)
from nemotron.ops.token_step.kernels.mamba import change_states, mix

_MAMBA, _ATTENTION, _EXPERTS = records.MAMBA, records.ATTENTION, records.EXPERTS


@njit(nogil=True, cache=True)
def run(address, thread, threads, kind):
    """Pass the tokens of a call through the layers, or change the states by what was kept."""
    call = items(address, 1, records.CALL)[0]
    count = call.num_layers
    layers = items(call.layers, count, records.LAYER)
    is_part = call.is_part  # the next call may change it once the last thread has come
    if call.counts:
        for number in range(count):
            if layers[number].kind == _MAMBA:
                change_states(call, layers[number], thread, threads, kind)
        wait(call.counter, threads)
        return
    if call.tokens:
        tokens = integers(call.tokens, call.rows * call.length)
        embed(call, tokens, thread, threads, kind)
        wait(call.counter, threads)
    if call.given:
        join(call, thread, threads, kind)
    for number in range(count):
        layer = layers[number]
        if layer.kind == _EXPERTS:
            mix_experts(call, layer, thread, threads, kind)
        else:
            stores = is_part and number == count - 1
            _mix(call, layer, stores, thread, threads, kind)
        wait(call.counter, threads)
    if is_part:
        return
    normalize_rows(call, call.result, call.final_norm, call.eps, thread, threads)
    wait(call.counter, threads)


@njit
def _mix(call, layer, stores, thread, threads, kind):
    """Norm, first projection, what lies between, last projection onto the residual stream.

    An attention layer that only `stores` ends with its keys and values.
    """
    tokens = call.rows * call.length
    normalize_rows(call, call.x, layer.norm, layer.eps, thread, threads)
    wait(call.counter, threads)
    source = call.mid_rows
    if layer.kind == _MAMBA:
        inner, size = layer.heads * layer.head_size, layer.groups * layer.state_size
        ends = (inner, 2 * inner, 2 * inner + size, 2 * (inner + size))  # of z, x, B and C
        linear_in_parts(
            call.x_rows, call.wide_rows, tokens, layer.first, call.size, ends,
            layer.first_blocks, thread, threads, kind,
        )  # fmt: skip
        wait(call.counter, threads)
        mix(call, layer, thread, threads, kind)
    elif layer.kind == _ATTENTION:
        skipped = layer.queries * layer.head_size // BLOCK if stores else 0
        linear(
            call.x_rows, call.wide_rows, tokens, layer.first, call.size, layer.first_blocks,
            True, thread, threads, kind, skipped,
        )  # fmt: skip
        wait(call.counter, threads)
        store(call, layer, thread, threads, kind)
        if stores:
            return
        wait(call.counter, threads)
        attend(call, layer, thread, threads, kind)
    else:
        source = call.wide_rows
        linear_with_square_relu(
            call.x_rows, call.wide_rows, tokens, layer.first, call.size, layer.first_blocks,
            thread, threads, kind,
        )  # fmt: skip
    wait(call.counter, threads)
    linear(
        source, call.hidden_rows, tokens, layer.last, layer.last_count, layer.last_blocks,
        False, thread, threads, kind,
    )  # fmt: skip


@njit(nogil=True, cache=True)
def multiply(address, thread, threads, kind):
    """y = x W for rows at equal steps of bytes; `tables` is memory, 16 bytes a row and thread."""
    call = items(address, 1, records.PRODUCT)[0]
    rows = call.rows
    sources = call.tables + thread * rows * 16
    targets = sources + rows * 8
    xs, ys = integers(sources, rows), integers(targets, rows)
    for row in range(rows):
        xs[row], ys[row] = call.x + row * call.x_step, call.y + row * call.y_step
    linear(
        sources, targets, rows, call.weight, call.inputs, call.blocks, True, thread, threads, kind
    )
    wait(call.counter, threads)
