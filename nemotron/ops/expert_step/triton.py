"""Routed experts of a few tokens by three Triton kernels, in the order up, down, sum.

A program multiplies a block of an expert's outputs with all rows that go to the expert, so that a
matrix is read once however many tokens chose it. It finds these rows in the list of choices
itself: nothing is sorted. The block of weights is the left operand, since Hopper's matrix units
take 64 rows on that side and as few as 8 columns on the other.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.expert_step import MOST_COPIES
from nemotron.ops.launch import dot_type
from nemotron.ops.tuning.tunable import Tunable

KINDS = (64, 16), (MOST_COPIES, 32)
"""Copies that a kernel is compiled for, and how many of an expert it multiplies at a time: two, so
that the first steps of each size need not wait for the compiler."""
COLUMNS = 512
"""Of a token's sum in a program."""


@triton.jit(do_not_specialize=["copies"])
def _multiply(
    rows_ptr,
    experts_ptr,
    weights_ptr,
    matrices_ptr,
    out_ptr,
    copies,
    rows_stride,
    K: tl.constexpr,
    N: tl.constexpr,
    COPIES: tl.constexpr,
    COPIES_A_ROW: tl.constexpr,
    BY_COPY: tl.constexpr,
    IS_UP: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
):
    number = tl.arange(0, COPIES)
    own = tl.program_id(0)
    chosen = tl.load(experts_ptr + number, mask=number < copies, other=-1)
    if BY_COPY:
        # the first copy of an expert takes the others along
        expert = tl.load(experts_ptr + own)
        is_here = (chosen == expert).to(tl.int32)
        earlier = tl.sum(tl.where(number < own, is_here, 0), 0)
        count = tl.where(earlier > 0, 0, tl.sum(is_here, 0))
    else:
        expert = own.to(tl.int64)
        is_here = (chosen == expert).to(tl.int32)
        count = tl.sum(is_here, 0)
    rank = tl.where(is_here > 0, tl.cumsum(is_here, 0) - 1, -1)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    turn = tl.arange(0, INPUTS)
    matrix = matrices_ptr + expert.to(tl.int64) * (N * K) + output[:, None] * K
    for start in tl.range(0, count, ROWS, num_stages=1):
        place = start + tl.arange(0, ROWS)
        is_copy = place < count
        found = tl.where(rank[None, :] == place[:, None], number[None, :], 0)
        copy = tl.sum(found, 1)
        row = rows_ptr + (copy // COPIES_A_ROW).to(tl.int64)[None, :] * rows_stride
        total = tl.zeros([OUTPUTS, ROWS], tl.float32)
        for first in tl.range(0, K, INPUTS, num_stages=STAGES):
            inner = first + turn
            inside = (output < N)[:, None] & (inner < K)[None, :]
            block = tl.load(matrix + inner[None, :], mask=inside, other=0.0).to(DOT)
            inside = (inner < K)[:, None] & is_copy[None, :]
            x = tl.load(row + inner[:, None], mask=inside, other=0.0).to(DOT)
            total = tl.dot(block, x, total, input_precision="ieee")
        if IS_UP:
            weight = tl.load(weights_ptr + copy, mask=is_copy, other=0.0).to(tl.float32)
            # written so that NaN stays NaN, as torch's relu has it
            total = tl.where(total < 0, 0.0, total)
            total = total * total * weight[None, :]
        at = out_ptr + copy.to(tl.int64)[None, :] * N + output[:, None]
        inside = (output < N)[:, None] & is_copy[None, :]
        tl.store(at, total.to(out_ptr.dtype.element_ty), mask=inside)


MULTIPLY = Tunable(
    "expert_step",
    "multiply",
    (_multiply,),
    ("copies", "outputs", "inputs"),
    # 64 KB on their way, three times what a multiprocessor needs to fill its share of the bandwidth
    {"outputs": 64, "block": 128, "stages": 4, "warps": 4},
    {
        "outputs": (64, 128),
        "block": (32, 64, 128, 256),
        "stages": (2, 3, 4, 5, 6, 8),
        "warps": (4, 8),
    },
    by_dtype={torch.float32: {"outputs": 64, "block": 64, "stages": 3, "warps": 4}},
    reorders=("block",),
)


@triton.jit
def _add(
    parts_ptr,
    shared_ptr,
    sums_ptr,
    shared_stride,
    N,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < N
    total = tl.zeros([COLUMNS], tl.float32)
    for k in tl.static_range(K):
        total += tl.load(parts_ptr + (token * K + k) * N + column, mask=inside, other=0.0)
    if shared_ptr is not None:
        at = shared_ptr + token * shared_stride + column
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(sums_ptr + token * N + column, total.to(sums_ptr.dtype.element_ty), mask=inside)


def expert_step(
    x: Float[Tensor, "M I"],
    experts: Int[Tensor, "M K"],
    weights: Float[Tensor, "M K"],
    up: Float[Tensor, "E F I"],
    down: Float[Tensor, "E I F"],
    shared: Float[Tensor, "M I"] | None,
) -> Float[Tensor, "M I"]:
    """The reference's formula; the same bits each time, and whichever tokens are beside one."""
    tokens, top_k = experts.shape
    size, width = x.shape[1], up.shape[1]
    sums = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not tokens:
        return sums
    assert x.stride(1) == 1, x.stride()
    assert up.is_contiguous(), up.stride()
    assert down.is_contiguous(), down.stride()
    experts, weights = experts.contiguous(), weights.contiguous()
    hidden = torch.empty(tokens * top_k, width, dtype=x.dtype, device=x.device)
    parts = torch.empty(tokens * top_k, size, dtype=torch.float32, device=x.device)
    _launch(x, experts, weights, up, hidden, top_k)
    _launch(hidden, experts, None, down, parts, 1)
    _add[(tokens, triton.cdiv(size, COLUMNS))](
        parts,
        shared,
        sums,
        0 if shared is None else shared.stride(0),
        size,
        K=top_k,
        COLUMNS=COLUMNS,
    )
    return sums


def _launch(
    rows: Float[Tensor, "rows I"],
    experts: Int[Tensor, "M K"],
    weights: Float[Tensor, "M K"] | None,
    matrices: Float[Tensor, "E O I"],
    out: Float[Tensor, "copies O"],
    copies_a_row: int,
) -> None:
    copies, (num_experts, outputs, inputs) = experts.numel(), matrices.shape
    most, at_once = next(kind for kind in KINDS if copies <= kind[0])
    launch = MULTIPLY.at(rows, copies, outputs, inputs)
    _multiply[(min(copies, num_experts), triton.cdiv(outputs, launch["outputs"]))](
        rows,
        experts,
        weights,
        matrices,
        out,
        copies,
        rows.stride(0),
        K=inputs,
        N=outputs,
        COPIES=most,
        COPIES_A_ROW=copies_a_row,
        BY_COPY=copies < num_experts,
        IS_UP=weights is not None,
        ROWS=at_once,
        OUTPUTS=launch["outputs"],
        INPUTS=launch["block"],
        STAGES=launch["stages"],
        DOT=dot_type(rows.dtype),
        num_warps=launch["warps"],
    )
