"""Triton kernels of the scan; `triton.py` launches them.

Per chunk of Q tokens, with cs the running sum of dt A inside the chunk and u = dt x:

    y_t = sum_{s<=t} (C_t . B_s) exp(cs_t - cs_s) u_s + exp(cs_t) C_t S + D x_t
    S'  = exp(cs_Q) S + sum_s exp(cs_Q - cs_s) u_s (x) B_s              (Dao & Gu 2024, section 6)

Backwards, dS is the gradient of the state that a chunk leaves:

    du_s  = sum_{t>=s} (C_t . B_s) exp(cs_t - cs_s) dy_t + exp(cs_Q - cs_s) dS B_s
    dS_in = exp(cs_Q) dS + sum_t exp(cs_t) dy_t (x) C_t

A row is cut into segments of several chunks, so that a few long rows still make enough programs:
one kernel finds what each segment alone adds to a state, the next starts each segment from the
sum of those before it. Documents are masks: no decay leads from one into another. What a program
adds up for A and D it leaves in a place of its own; no result depends on the order of programs.

Letters: Q tokens of a chunk, R heads of a group, P and N as always. `DOT` is the type of a
product's operands, `SUM` that of running sums and of sums that nearly cancel.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST_EXPONENT = tl.constexpr(32.0)
"""Of 2, in weights of pairs: those that count stay below the log2 of the longest time step."""
SHORTEST_STEP = tl.constexpr(2.0**-60)
"""Stands for 0, whose logarithm is taken and by which is divided; float32 sums do not see it."""

# lengths that vary from call to call; 1 and multiples of 16 need no compilation of their own
_LENGTHS = ("T", "num_chunks", "segment_chunks", "num_segments")


@triton.jit
def _tokens(pointer, stride, start, T, Q: tl.constexpr, WIDTH: tl.constexpr):
    """Load [Q, WIDTH] of a chunk; tokens after the row's end are zero."""
    q = tl.arange(0, Q)
    pointer += start.to(tl.int64) * stride
    offsets = q[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    return tl.load(pointer + offsets, mask=(start + q < T)[:, None], other=0.0)


@triton.jit
def _store_tokens(pointer, stride, values, start, T, Q: tl.constexpr, WIDTH: tl.constexpr):
    """Store [Q, WIDTH] of a chunk, without the tokens after the row's end."""
    q = tl.arange(0, Q)
    pointer += start.to(tl.int64) * stride
    offsets = q[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    values = values.to(pointer.dtype.element_ty)
    tl.store(pointer + offsets, values, mask=(start + q < T)[:, None])


@triton.jit
def _state_offsets(P: tl.constexpr, N: tl.constexpr):
    return tl.arange(0, P)[:, None] * N + tl.arange(0, N)[None, :]


@triton.jit
def _documents(ids_ptr, start, T, Q: tl.constexpr):
    """Load the documents of a chunk; what comes after the row belongs to its last one."""
    return tl.load(ids_ptr + tl.minimum(start + tl.arange(0, Q), T - 1))


@triton.jit
def _decays(dt_ptr, stride, ids_ptr, A, start, T, Q: tl.constexpr, SUM: tl.constexpr):
    """Return what has one number per token of a chunk and head.

    dt; log2 of the decay since the chunk's start; the decay from the state before the chunk to the
    token, and from the token to the state after it; the decay of the whole chunk.
    Tokens after the row's end have no time step and the last token's document: they change nothing.
    """
    q = tl.arange(0, Q)
    dt_ptr += start.to(tl.int64) * stride
    dt = tl.load(dt_ptr + q * stride, mask=start + q < T, other=0.0).to(tl.float32)
    dt = tl.maximum(dt, SHORTEST_STEP)
    cs = tl.cumsum((dt * (A * LOG2_E)).to(SUM), 0)
    total = tl.sum(tl.where(q == Q - 1, cs, 0.0), 0)
    into = tl.exp2(cs.to(tl.float32))
    out_of = tl.exp2((total - cs).to(tl.float32))
    keep = tl.exp2(total.to(tl.float32))
    if ids_ptr is not None:
        ids = _documents(ids_ptr, start, T, Q)
        # what comes before the row belongs to document 0
        before = tl.load(ids_ptr + tl.maximum(start - 1, 0))
        before = tl.where(start == 0, 0, before)
        last = tl.load(ids_ptr + tl.minimum(start + Q, T) - 1)
        into = tl.where(ids == before, into, 0.0)
        out_of = tl.where(ids == last, out_of, 0.0)
        keep = tl.where(last == before, keep, 0.0)
    return dt, cs, into, out_of, keep


@triton.jit
def _visible(ids_ptr, start, T, Q: tl.constexpr):
    """Return [Q, Q]: whether token t (a row) sees token s: not a later one, of one document."""
    # of a loop's own start, so that the mask is not kept in registers all through the loop
    t = start + tl.arange(0, Q)
    visible = t[:, None] >= t[None, :]
    if ids_ptr is not None:
        ids = _documents(ids_ptr, start, T, Q)
        visible = visible & (ids[:, None] == ids[None, :])
    return visible


@triton.jit
def _weights(cs, dt):
    """Return [Q, Q] exp(cs_t - cs_s) dt_s where s is not after t, something finite elsewhere."""
    exponent = (cs[:, None] - (cs - tl.log2(dt).to(cs.dtype))[None, :]).to(tl.float32)
    return tl.exp2(tl.minimum(exponent, LARGEST_EXPONENT))


@triton.jit
def _start_of_segment(
    outer_ptr, segment_states_ptr, segment_decays_ptr, row, head, H, segment, num_segments,
    BACKWARD: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Return the state at the segment's start, or its gradient at the segment's end."""
    offsets = _state_offsets(P, N)
    if outer_ptr is not None:
        state = tl.load(outer_ptr + (row * H + head) * P * N + offsets).to(tl.float32)
    else:
        state = tl.zeros((P, N), tl.float32)
    others = num_segments - 1 - segment if BACKWARD else segment
    for i in range(others):
        other = num_segments - 1 - i if BACKWARD else i
        place = (row * num_segments + other) * H + head
        state *= tl.load(segment_decays_ptr + place)
        state += tl.load(segment_states_ptr + place * P * N + offsets)
    return state


@triton.jit
def _walk(
    state, values_ptr, values_stride, keys_ptr, keys_stride, dt_ptr, dt_stride, ids_ptr, A,
    chunks_ptr, chunks_stride, first, count, T,
    BACKWARD: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    DOT: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Carry a state through `count` chunks; return it and the decay of all of them.

    Forward the values are x and the keys B; backward the state is dS, they are dy and C, and the
    last chunk is the first to be visited. With `chunks_ptr`, what each chunk finds is stored.
    """
    decay = 1.0
    for i in range(count):
        chunk = first + (count - 1 - i if BACKWARD else i)
        start = chunk * Q
        dt, _, into, out_of, keep = _decays(dt_ptr, dt_stride, ids_ptr, A, start, T, Q, SUM)
        values = _tokens(values_ptr, values_stride, start, T, Q, P).to(tl.float32)
        keys = _tokens(keys_ptr, keys_stride, start, T, Q, N).to(DOT)
        if chunks_ptr is not None:
            place = chunks_ptr + chunk.to(tl.int64) * chunks_stride + _state_offsets(P, N)
            tl.store(place, state.to(chunks_ptr.dtype.element_ty))
        weight = into if BACKWARD else out_of * dt
        weighted = (values * weight[:, None]).to(DOT)
        state = tl.dot(tl.trans(weighted), keys, state * keep, input_precision="ieee")
        decay *= keep
    return state, decay


@triton.jit(do_not_specialize=_LENGTHS)
def segment_states(
    x_ptr, x_b, x_t, x_h, dy_ptr, dy_b, dy_t, dy_h, dt_ptr, dt_b, dt_t, dt_h, A_ptr,
    B_ptr, B_b, B_t, B_g, C_ptr, C_b, C_t, C_g, ids_ptr, ids_b,
    states_ptr, dstates_ptr, decays_ptr, T, H, num_chunks, segment_chunks, num_segments,
    R: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    DOT: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Find what each segment adds to the state, and given dy, to the state's gradient.

    A program per (head, segment, row); given dy, twice as many rows: each forward and backward.
    """
    head, segment = tl.program_id(0), tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    backward = 0
    if dy_ptr is not None:
        backward = row % 2
        row = row // 2
    A = tl.load(A_ptr + head).to(tl.float32)
    dt_ptr += row * dt_b + head * dt_h
    if ids_ptr is not None:
        ids_ptr += row * ids_b
    first = segment * segment_chunks
    count = tl.minimum(segment_chunks, num_chunks - first)
    place = (row * num_segments + segment) * H + head
    offsets = place * P * N + _state_offsets(P, N)
    state = tl.zeros((P, N), tl.float32)
    if backward == 0:
        state, decay = _walk(
            state, x_ptr + row * x_b + head * x_h, x_t, B_ptr + row * B_b + head // R * B_g, B_t,
            dt_ptr, dt_t, ids_ptr, A, None, 0, first, count, T, False, P, N, Q, DOT, SUM,
        )  # fmt: skip
        tl.store(states_ptr + offsets, state)
        tl.store(decays_ptr + place, decay)
    elif dy_ptr is not None:
        state, _ = _walk(
            state, dy_ptr + row * dy_b + head * dy_h, dy_t, C_ptr + row * C_b + head // R * C_g,
            C_t, dt_ptr, dt_t, ids_ptr, A, None, 0, first, count, T, True, P, N, Q, DOT, SUM,
        )  # fmt: skip
        tl.store(dstates_ptr + offsets, state)


@triton.jit(do_not_specialize=_LENGTHS)
def outputs(
    x_ptr, x_b, x_t, x_h, dt_ptr, dt_b, dt_t, dt_h, A_ptr, B_ptr, B_b, B_t, B_g,
    C_ptr, C_b, C_t, C_g, D_ptr, ids_ptr, ids_b, initial_ptr, segment_states_ptr,
    segment_decays_ptr, y_ptr, final_ptr, T, H, num_chunks, segment_chunks, num_segments,
    R: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    DOT: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Compute y chunk by chunk and the state after the row; a program per (head, segment, row)."""
    head, segment = tl.program_id(0), tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    A = tl.load(A_ptr + head).to(tl.float32)
    D = tl.load(D_ptr + head).to(tl.float32)
    x_ptr += row * x_b + head * x_h
    y_ptr += (row * T * H + head) * P
    dt_ptr += row * dt_b + head * dt_h
    B_ptr += row * B_b + head // R * B_g
    C_ptr += row * C_b + head // R * C_g
    if ids_ptr is not None:
        ids_ptr += row * ids_b
    state = _start_of_segment(
        initial_ptr, segment_states_ptr, segment_decays_ptr, row, head, H, segment, num_segments,
        False, P, N,
    )  # fmt: skip
    first = segment * segment_chunks
    count = tl.minimum(segment_chunks, num_chunks - first)
    end = tl.minimum((first + count) * Q, T)
    # Triton loads B and C ahead, but not x, which serves three products in different layouts
    next_x = _tokens(x_ptr, x_t, first * Q, end, Q, P)
    for i in range(count):
        start = (first + i) * Q
        x = next_x
        next_x = _tokens(x_ptr, x_t, start + Q, end, Q, P)
        dt, cs, into, out_of, keep = _decays(dt_ptr, dt_t, ids_ptr, A, start, T, Q, SUM)
        B = _tokens(B_ptr, B_t, start, T, Q, N).to(DOT)
        C = _tokens(C_ptr, C_t, start, T, Q, N).to(DOT)
        weights = tl.dot(C, tl.trans(B), input_precision="ieee")
        weights *= _weights(cs, dt)
        weights = tl.where(_visible(ids_ptr, start, T, Q), weights, 0.0)
        # in this order no product goes on with another's sum: Triton would then make each group
        # of four warps compute all of the first one
        x_wide = x.to(tl.float32)
        y = tl.dot(weights.to(DOT), x.to(DOT), x_wide * D, input_precision="ieee")
        y += tl.dot(C, tl.trans(state.to(DOT)), input_precision="ieee") * into[:, None]
        _store_tokens(y_ptr, H * P, y, start, T, Q, P)
        weighted = (x_wide * (out_of * dt)[:, None]).to(DOT)
        state = tl.dot(tl.trans(weighted), B, state * keep, input_precision="ieee")
    if segment == num_segments - 1:
        tl.store(final_ptr + (row * H + head) * P * N + _state_offsets(P, N), state)


@triton.jit(do_not_specialize=_LENGTHS)
def chunk_states(
    x_ptr, x_b, x_t, x_h, dy_ptr, dy_b, dy_t, dy_h, dt_ptr, dt_b, dt_t, dt_h, A_ptr,
    B_ptr, B_b, B_t, B_g, C_ptr, C_b, C_t, C_g, ids_ptr, ids_b, initial_ptr, dfinal_ptr,
    segment_states_ptr, segment_dstates_ptr, segment_decays_ptr,
    states_ptr, dstates_ptr, dinitial_ptr, T, H, num_chunks, segment_chunks, num_segments,
    R: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    DOT: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Store the state before each chunk and the gradient of the state after it.

    A program per (head, segment, row and direction).
    """
    head, segment = tl.program_id(0), tl.program_id(1)
    row = tl.program_id(2).to(tl.int64) // 2
    backward = tl.program_id(2) % 2
    A = tl.load(A_ptr + head).to(tl.float32)
    dt_ptr += row * dt_b + head * dt_h
    if ids_ptr is not None:
        ids_ptr += row * ids_b
    first = segment * segment_chunks
    count = tl.minimum(segment_chunks, num_chunks - first)
    chunks = (row * num_chunks * H + head) * P * N
    if backward == 0:
        state = _start_of_segment(
            initial_ptr, segment_states_ptr, segment_decays_ptr, row, head, H, segment,
            num_segments, False, P, N,
        )  # fmt: skip
        _walk(
            state, x_ptr + row * x_b + head * x_h, x_t, B_ptr + row * B_b + head // R * B_g, B_t,
            dt_ptr, dt_t, ids_ptr, A, states_ptr + chunks, H * P * N, first, count, T,
            False, P, N, Q, DOT, SUM,
        )  # fmt: skip
    else:
        state = _start_of_segment(
            dfinal_ptr, segment_dstates_ptr, segment_decays_ptr, row, head, H, segment,
            num_segments, True, P, N,
        )  # fmt: skip
        state, _ = _walk(
            state, dy_ptr + row * dy_b + head * dy_h, dy_t, C_ptr + row * C_b + head // R * C_g,
            C_t, dt_ptr, dt_t, ids_ptr, A, dstates_ptr + chunks, H * P * N, first, count, T,
            True, P, N, Q, DOT, SUM,
        )  # fmt: skip
        if dinitial_ptr is not None:  # known when compiling  # noqa: SIM102
            if segment == 0:
                tl.store(dinitial_ptr + (row * H + head) * P * N + _state_offsets(P, N), state)


@triton.jit(do_not_specialize=_LENGTHS)
def gradients_of_heads(
    x_ptr, x_b, x_t, x_h, dy_ptr, dy_b, dy_t, dy_h, dt_ptr, dt_b, dt_t, dt_h, A_ptr,
    B_ptr, B_b, B_t, B_g, C_ptr, C_b, C_t, C_g, D_ptr, ids_ptr, ids_b, states_ptr, dstates_ptr,
    dx_ptr, ddt_ptr, dA_ptr, dD_ptr, T, H,
    R: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    DOT: tl.constexpr, SUM: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Compute dx, ddt and each program's part of dA and dD.

    A program per (`HEADS` heads of a group, chunk, row).
    """
    first, chunk = tl.program_id(0) * HEADS, tl.program_id(1)
    group = first // R
    row = tl.program_id(2).to(tl.int64)
    q = tl.arange(0, Q)
    start = chunk * Q
    B = _tokens(B_ptr + row * B_b + group * B_g, B_t, start, T, Q, N).to(DOT)
    C = _tokens(C_ptr + row * C_b + group * C_g, C_t, start, T, Q, N).to(DOT)
    if ids_ptr is not None:
        ids_ptr += row * ids_b
    CB = tl.dot(C, tl.trans(B), input_precision="ieee")
    CB = tl.where(_visible(ids_ptr, start, T, Q), CB, 0.0)
    for r in range(HEADS):
        head = first + r
        A = tl.load(A_ptr + head).to(tl.float32)
        D = tl.load(D_ptr + head).to(tl.float32)
        dt_head = dt_ptr + row * dt_b + head * dt_h
        dt, cs, into, out_of, keep = _decays(dt_head, dt_t, ids_ptr, A, start, T, Q, SUM)
        place = (row * tl.num_programs(1) + chunk) * H + head
        offsets = place * P * N + _state_offsets(P, N)
        state = tl.load(states_ptr + offsets).to(DOT)
        dstate = tl.load(dstates_ptr + offsets).to(DOT)
        x = _tokens(x_ptr + row * x_b + head * x_h, x_t, start, T, Q, P)
        dy = _tokens(dy_ptr + row * dy_b + head * dy_h, dy_t, start, T, Q, P)
        kept = keep * tl.sum(state.to(tl.float32) * dstate.to(tl.float32))
        # how the loss changes with cs of a token: through the state before the chunk, ...
        Cstate = tl.dot(C, tl.trans(state), input_precision="ieee")
        gained = (into * tl.sum(Cstate * dy.to(tl.float32), 1)).to(SUM)
        # ... through the state after it, which falls with cs of the token, ...
        du = tl.dot(B, tl.trans(dstate), input_precision="ieee") * out_of[:, None]
        ddt = tl.sum(du * x.to(tl.float32), 1)
        left = (dt * ddt).to(SUM)
        # ... and through pairs of tokens of the chunk
        weights = CB * _weights(cs, dt)
        dx = tl.dot(tl.trans(weights.to(DOT)), dy.to(DOT), input_precision="ieee")
        pairs = tl.dot(dy.to(DOT), tl.trans(x.to(DOT)), input_precision="ieee")
        pairs = (pairs * weights).to(SUM)
        gained += tl.sum(pairs, 1) - tl.sum(pairs, 0)
        # dt A of a token decays what it and later ones gain, and what earlier ones leave
        change = gained - left
        da = tl.sum(gained, 0) - (tl.cumsum(change, 0) - change)
        da = da.to(tl.float32) + kept
        x, dy = x.to(tl.float32), dy.to(tl.float32)
        ddt += tl.sum(dx * x, 1) / dt + da * A
        dx += du * dt[:, None] + dy * D
        _store_tokens(dx_ptr + (row * T * H + head) * P, H * P, dx, start, T, Q, P)
        tl.store(ddt_ptr + (row * T + start + q) * H + head, ddt, mask=start + q < T)
        tl.store(dA_ptr + place, tl.sum(da * dt, 0))
        tl.store(dD_ptr + place, tl.sum(dy * x))


@triton.jit(do_not_specialize=_LENGTHS)
def gradients_of_groups(
    x_ptr, x_b, x_t, x_h, dy_ptr, dy_b, dy_t, dy_h, dt_ptr, dt_b, dt_t, dt_h, A_ptr,
    B_ptr, B_b, B_t, B_g, C_ptr, C_b, C_t, C_g, ids_ptr, ids_b, states_ptr, dstates_ptr,
    dB_ptr, dC_ptr, T, H,
    R: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    DOT: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Compute dB and dC, summed over the heads of a group; a program per (group, chunk, row)."""
    group, chunk = tl.program_id(0), tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    start = chunk * Q
    if ids_ptr is not None:
        ids_ptr += row * ids_b
    dB = tl.zeros((Q, N), tl.float32)
    dC = tl.zeros((Q, N), tl.float32)
    dCB = tl.zeros((Q, Q), tl.float32)
    for r in range(R):
        head = group * R + r
        A = tl.load(A_ptr + head).to(tl.float32)
        dt_head = dt_ptr + row * dt_b + head * dt_h
        dt, cs, into, out_of, _ = _decays(dt_head, dt_t, ids_ptr, A, start, T, Q, SUM)
        x = _tokens(x_ptr + row * x_b + head * x_h, x_t, start, T, Q, P)
        dy = _tokens(dy_ptr + row * dy_b + head * dy_h, dy_t, start, T, Q, P)
        place = (row * tl.num_programs(1) + chunk) * H + head
        offsets = place * P * N + _state_offsets(P, N)
        state = tl.load(states_ptr + offsets).to(DOT)
        dstate = tl.load(dstates_ptr + offsets).to(DOT)
        dy_into = (dy.to(tl.float32) * into[:, None]).to(DOT)
        dC = tl.dot(dy_into, state, dC, input_precision="ieee")
        ending = (x.to(tl.float32) * (out_of * dt)[:, None]).to(DOT)
        dB = tl.dot(ending, dstate, dB, input_precision="ieee")
        pairs = tl.dot(dy.to(DOT), tl.trans(x.to(DOT)), input_precision="ieee")
        dCB += pairs * _weights(cs, dt)
    dCB = tl.where(_visible(ids_ptr, start, T, Q), dCB, 0.0)
    B = _tokens(B_ptr + row * B_b + group * B_g, B_t, start, T, Q, N).to(DOT)
    dC = tl.dot(dCB.to(DOT), B, dC, input_precision="ieee")
    C = _tokens(C_ptr + row * C_b + group * C_g, C_t, start, T, Q, N).to(DOT)
    dB = tl.dot(tl.trans(dCB.to(DOT)), C, dB, input_precision="ieee")
    G = tl.num_programs(0)
    _store_tokens(dB_ptr + (row * T * G + group) * N, G * N, dB, start, T, Q, N)
    _store_tokens(dC_ptr + (row * T * G + group) * N, G * N, dC, start, T, Q, N)
