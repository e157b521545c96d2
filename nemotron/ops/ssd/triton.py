"""The scan in Triton kernels of our own: two launches forward, four backward.

Nothing but the inputs is kept for the backward pass, which computes the states between chunks
again. Decays, states and sums are float32, products are taken in the dtype of x.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.launch import dot_type
from nemotron.ops.ssd import triton_kernels as kernels

CHUNK = {torch.bfloat16: 64, torch.float32: 16}
"""Tokens in a chunk: with twice as many the kernels run out of registers."""
PROGRAMS = 512
"""Programs that a walk over segments should have: about four for each of a GPU's processors."""
SHORTEST_SEGMENT = 8
"""Chunks in a segment at least: the sum over the segments before costs about one chunk each."""

# warps and stages by dtype of x: no bfloat16 kernel spills registers on compute capability 9.0
_SEGMENT_STATES = {torch.bfloat16: (4, 3), torch.float32: (8, 1)}
_OUTPUTS = {torch.bfloat16: (8, 3), torch.float32: (8, 1)}
_CHUNK_STATES = {torch.bfloat16: (4, 3), torch.float32: (8, 1)}
_GRADIENTS_OF_HEADS = {torch.bfloat16: (8, 2), torch.float32: (8, 1)}
_GRADIENTS_OF_GROUPS = {torch.bfloat16: (8, 2), torch.float32: (8, 1)}


class _Cut(NamedTuple):
    """How rows are cut into chunks and segments of chunks."""

    num_chunks: int
    segment_chunks: int
    num_segments: int

    @staticmethod
    def of(x: Float[Tensor, "B T H P"]) -> "_Cut":
        rows, num_tokens, heads, _ = x.shape
        num_chunks = triton.cdiv(num_tokens, CHUNK[x.dtype])
        wanted = triton.cdiv(PROGRAMS, rows * heads)
        segment_chunks = max(triton.cdiv(num_chunks, wanted), SHORTEST_SEGMENT)
        return _Cut(num_chunks, segment_chunks, triton.cdiv(num_chunks, segment_chunks))


def _constants(x: Float[Tensor, "B T H P"], B: Float[Tensor, "B T G N"]) -> dict[str, Any]:
    """Return what kernels are compiled for, beside the dtypes."""
    return {
        "R": x.shape[2] // B.shape[2],
        "P": x.shape[3],
        "N": B.shape[3],
        "Q": CHUNK[x.dtype],
        "DOT": dot_type(x.dtype),
        # float32 has digits to lose where a long time step multiplies a difference
        "SUM": tl.float64 if x.dtype == torch.float32 else tl.float32,
    }


def _launch(settings: dict[torch.dtype, tuple[int, int]], x: Tensor) -> dict[str, int]:
    num_warps, num_stages = settings[x.dtype]
    return {"num_warps": num_warps, "num_stages": num_stages}


def _in_place(tensor: Tensor) -> Tensor:
    """Return a tensor whose last dimension the kernels can read; a slice of channels is one."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "B T H P"],
        dt: Float[Tensor, "B T H"],
        A: Float[Tensor, " H"],
        B: Float[Tensor, "B T G N"],
        C: Float[Tensor, "B T G N"],
        D: Float[Tensor, " H"],
        initial_state: Float[Tensor, "B H P N"] | None,
        ids: Int[Tensor, "B T"] | None,
    ) -> tuple[Float[Tensor, "B T H P"], Float[Tensor, "B H P N"]]:
        rows, num_tokens, heads, P = x.shape
        N = B.shape[3]
        cut, constants = _Cut.of(x), _constants(x, B)
        # heads first: those of a group run at the same time and find its B and C in the cache
        grid = (heads, cut.num_segments, rows)
        segment_states = dt.new_empty(rows, cut.num_segments, heads, P, N)
        segment_decays = dt.new_empty(rows, cut.num_segments, heads)
        ids_stride = 0 if ids is None else ids.stride(0)
        if cut.num_segments > 1:
            # nothing comes after the last segment
            kernels.segment_states[(heads, cut.num_segments - 1, rows)](
                x, *x.stride()[:3], None, 0, 0, 0, dt, *dt.stride(), A,
                B, *B.stride()[:3], None, 0, 0, 0, ids, ids_stride,
                segment_states, None, segment_decays,
                num_tokens, heads, *cut,
                **constants, **_launch(_SEGMENT_STATES, x),
            )  # fmt: skip
        y = x.new_empty(x.shape)
        final_state = dt.new_empty(rows, heads, P, N)
        kernels.outputs[grid](
            x, *x.stride()[:3], dt, *dt.stride(), A, B, *B.stride()[:3], C, *C.stride()[:3], D,
            ids, ids_stride, initial_state, segment_states, segment_decays, y, final_state,
            num_tokens, heads, *cut, **constants, **_launch(_OUTPUTS, x),
        )  # fmt: skip
        ctx.save_for_backward(x, dt, A, B, C, D, initial_state, ids)
        ctx.set_materialize_grads(False)
        return y, final_state

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, initial_state, ids = ctx.saved_tensors
        needs_x, needs_dt, needs_A, needs_B, needs_C, needs_D, needs_state, _ = ctx.needs_input_grad
        rows, num_tokens, heads, P = x.shape
        groups, N = B.shape[2:]
        cut, constants = _Cut.of(x), _constants(x, B)
        dy = torch.zeros_like(x) if dy is None else _in_place(dy)
        dfinal = None if dfinal is None else dfinal.contiguous()
        ids_stride = 0 if ids is None else ids.stride(0)
        inputs = (
            x, *x.stride()[:3], dy, *dy.stride()[:3], dt, *dt.stride(), A,
            B, *B.stride()[:3], C, *C.stride()[:3],
        )  # fmt: skip

        segment_states = dt.new_empty(rows, cut.num_segments, heads, P, N)
        segment_dstates = torch.empty_like(segment_states)
        segment_decays = dt.new_empty(rows, cut.num_segments, heads)
        both_directions = (heads, cut.num_segments, 2 * rows)
        if cut.num_segments > 1:
            kernels.segment_states[both_directions](
                *inputs, ids, ids_stride, segment_states, segment_dstates, segment_decays,
                num_tokens, heads, *cut,
                **constants, **_launch(_SEGMENT_STATES, x),
            )  # fmt: skip
        states = x.new_empty(rows, cut.num_chunks, heads, P, N)
        dstates = torch.empty_like(states)
        dinitial = torch.empty_like(initial_state) if needs_state else None
        kernels.chunk_states[both_directions](
            *inputs, ids, ids_stride, initial_state, dfinal,
            segment_states, segment_dstates, segment_decays, states, dstates, dinitial,
            num_tokens, heads, *cut, **constants, **_launch(_CHUNK_STATES, x),
        )  # fmt: skip

        dx = ddt = dA = dB = dC = dD = None
        if needs_x or needs_dt or needs_A or needs_D:
            dx, ddt = x.new_empty(x.shape), dt.new_empty(dt.shape)
            dA, dD = dt.new_empty(2, rows, cut.num_chunks, heads)
            kernels.gradients_of_heads[(groups, cut.num_chunks, rows)](
                *inputs, D, ids, ids_stride, states, dstates, dx, ddt, dA, dD,
                num_tokens, heads, **constants, **_launch(_GRADIENTS_OF_HEADS, x),
            )  # fmt: skip
            dA, dD = dA.sum((0, 1)).to(A.dtype), dD.sum((0, 1)).to(D.dtype)
        if needs_B or needs_C:
            dB, dC = B.new_empty(B.shape), C.new_empty(C.shape)
            kernels.gradients_of_groups[(groups, cut.num_chunks, rows)](
                *inputs, ids, ids_stride, states, dstates, dB, dC,
                num_tokens, heads, **constants, **_launch(_GRADIENTS_OF_GROUPS, x),
            )  # fmt: skip
        return dx, ddt, dA, dB, dC, dD, dinitial, None


def ssd(
    x: Float[Tensor, "B T H P"],
    dt: Float[Tensor, "B T H"],
    A: Float[Tensor, " H"],
    B: Float[Tensor, "B T G N"],
    C: Float[Tensor, "B T G N"],
    D: Float[Tensor, " H"],
    initial_state: Float[Tensor, "B H P N"] | None,
    seq_idx: Int[Tensor, "B T"] | None,
) -> tuple[Float[Tensor, "B T H P"], Float[Tensor, "B H P N"]]:
    """Scan in Triton kernels; P and N are powers of 2 from 16 to 128, documents ascend."""
    x, B, C = (_in_place(tensor) for tensor in (x, B, C))
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    if seq_idx is not None:
        seq_idx = seq_idx.contiguous()
    y, final_state = _Scan.apply(
        x, dt, A.contiguous(), B, C, D.contiguous(), initial_state, seq_idx
    )
    return y, final_state
