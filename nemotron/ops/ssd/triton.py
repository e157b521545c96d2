"""The scan in Triton kernels of our own: two launches forward, four backward.

Nothing but the inputs is kept for the backward pass, which computes the states between chunks
again. Decays, states and sums are float32, products are taken in the dtype of x.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.launch import dot_type
from nemotron.ops.ssd import triton_kernels as kernels
from nemotron.ops.tuning.tunable import Tunable

CHUNK = {torch.bfloat16: 64, torch.float32: 16}
"""Tokens in a chunk: with twice as many the kernels run out of registers."""
AXES = ("rows", "tokens", "heads", "heads_of_group", "head_dim", "state")
WARPS, STAGES = (4, 8, 16), (1, 2, 3, 4)

SEGMENTS = Tunable(
    "ssd",
    "segments",
    (kernels.segment_states, kernels.outputs, kernels.chunk_states),
    AXES,
    # programs that a walk over segments should have: about four for each of a GPU's processors;
    # chunks in a segment at least: the sum over the segments before costs about one chunk each
    {"programs": 512, "shortest": 8},
    {"programs": (256, 512, 768, 1024, 2048), "shortest": (4, 8, 16)},
    reorders=("programs", "shortest"),
)
# no bfloat16 kernel spills registers on compute capability 9.0 with these defaults
SEGMENT_STATES, OUTPUTS, CHUNK_STATES, GRADIENTS_OF_GROUPS = (
    Tunable(
        "ssd",
        kernel.__name__,
        (kernel,),
        AXES,
        {"warps": warps, "stages": stages},
        {"warps": WARPS, "stages": STAGES},
        by_dtype={torch.float32: {"warps": 8, "stages": 1}},
        reorders=("warps", "stages"),
    )
    for kernel, warps, stages in (
        (kernels.segment_states, 4, 3),
        (kernels.outputs, 8, 3),
        (kernels.chunk_states, 4, 3),
        (kernels.gradients_of_groups, 8, 2),
    )
)
GRADIENTS_OF_HEADS = Tunable(
    "ssd",
    "gradients_of_heads",
    (kernels.gradients_of_heads,),
    AXES,
    # with more parts of a group's heads there are more programs, each of which multiplies C by B
    {"warps": 8, "stages": 2, "parts": 1},
    {"warps": WARPS, "stages": STAGES, "parts": (1, 2, 4, 8)},
    by_dtype={torch.float32: {"warps": 8, "stages": 1, "parts": 1}},
    # another loop may be laid out over threads in another way, and so may its sums
    reorders=("warps", "stages", "parts"),
)


class _Cut(NamedTuple):
    """How rows are cut into chunks and segments of chunks."""

    num_chunks: int
    segment_chunks: int
    num_segments: int

    @staticmethod
    def of(x: Float[Tensor, "B T H P"], sizes: tuple[int, ...]) -> "_Cut":
        rows, num_tokens, heads, _ = x.shape
        launch = SEGMENTS.at(x, *sizes)
        num_chunks = triton.cdiv(num_tokens, CHUNK[x.dtype])
        wanted = triton.cdiv(launch["programs"], rows * heads)
        segment_chunks = max(triton.cdiv(num_chunks, wanted), launch["shortest"])
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


def _sizes(x: Float[Tensor, "B T H P"], B: Float[Tensor, "B T G N"]) -> tuple[int, ...]:
    rows, num_tokens, heads, P = x.shape
    groups, N = B.shape[2:]
    return rows, num_tokens, heads, heads // groups, P, N


def _launch(tunable: Tunable, x: Tensor, sizes: tuple[int, ...]) -> dict[str, int]:
    found = tunable.at(x, *sizes)
    return {"num_warps": found["warps"], "num_stages": found["stages"]}


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
        sizes, constants = _sizes(x, B), _constants(x, B)
        cut = _Cut.of(x, sizes)
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
                **constants, **_launch(SEGMENT_STATES, x, sizes),
            )  # fmt: skip
        y = x.new_empty(x.shape)
        final_state = dt.new_empty(rows, heads, P, N)
        kernels.outputs[grid](
            x, *x.stride()[:3], dt, *dt.stride(), A, B, *B.stride()[:3], C, *C.stride()[:3], D,
            ids, ids_stride, initial_state, segment_states, segment_decays, y, final_state,
            num_tokens, heads, *cut, **constants, **_launch(OUTPUTS, x, sizes),
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
        sizes, constants = _sizes(x, B), _constants(x, B)
        cut = _Cut.of(x, sizes)
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
                **constants, **_launch(SEGMENT_STATES, x, sizes),
            )  # fmt: skip
        states = x.new_empty(rows, cut.num_chunks, heads, P, N)
        dstates = torch.empty_like(states)
        dinitial = torch.empty_like(initial_state) if needs_state else None
        kernels.chunk_states[both_directions](
            *inputs, ids, ids_stride, initial_state, dfinal,
            segment_states, segment_dstates, segment_decays, states, dstates, dinitial,
            num_tokens, heads, *cut, **constants, **_launch(CHUNK_STATES, x, sizes),
        )  # fmt: skip

        dx = ddt = dA = dB = dC = dD = None
        if needs_x or needs_dt or needs_A or needs_D:
            dx, ddt = x.new_empty(x.shape), dt.new_empty(dt.shape)
            dA, dD = dt.new_empty(2, rows, cut.num_chunks, heads)
            parts = math.gcd(GRADIENTS_OF_HEADS.at(x, *sizes)["parts"], heads // groups)
            kernels.gradients_of_heads[(groups * parts, cut.num_chunks, rows)](
                *inputs, D, ids, ids_stride, states, dstates, dx, ddt, dA, dD,
                num_tokens, heads, **constants, HEADS=heads // groups // parts,
                **_launch(GRADIENTS_OF_HEADS, x, sizes),
            )  # fmt: skip
            dA, dD = dA.sum((0, 1)).to(A.dtype), dD.sum((0, 1)).to(D.dtype)
        if needs_B or needs_C:
            dB, dC = B.new_empty(B.shape), C.new_empty(C.shape)
            kernels.gradients_of_groups[(groups, cut.num_chunks, rows)](
                *inputs, ids, ids_stride, states, dstates, dB, dC,
                num_tokens, heads, **constants, **_launch(GRADIENTS_OF_GROUPS, x, sizes),
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
