"""The sums of the balance loss by Triton kernels: two launches, one backward, no atomics."""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron.ops.launch import Launcher, power_of_2
from nemotron.ops.rms_norm.triton import rows_of_a_block

ELEMENTS = 2048
"""Scores that a program holds at a time."""
TOKENS = 16
"""Tokens of a program at least: each leaves two rows of partial sums."""
BLOCKS, EXPERTS = 64, 32
"""Partial sums and experts of a tile when they are added up."""


@triton.jit
def _parts(
    scores_ptr,
    padding_ptr,
    part_ptr,
    hits_ptr,
    tokens,
    E: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Add up over some tokens of a row their shares, and how often each expert is in the top K."""
    row = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    part = tl.zeros([COLUMNS], tl.float32)
    hits = tl.zeros([COLUMNS], tl.int32)
    for step in tl.range(STEPS):
        token = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        is_real = token < tokens
        at = scores_ptr + (row * tokens + token)[:, None] * E + column[None, :]
        inside = is_real[:, None] & (column < E)[None, :]
        scores = tl.load(at, mask=inside, other=0.0)
        if PADDED:
            is_padding = tl.load(padding_ptr + row * tokens + token, mask=is_real, other=1)
            is_real = is_real & (is_padding == 0)
        share = scores / (tl.sum(scores, 1) + 1e-20)[:, None]
        # NaN counts as the largest, as in torch
        left = tl.where(share == share, share, float("inf"))
        left = tl.where((column < E)[None, :], left, -float("inf"))
        for _ in tl.static_range(K):
            expert = tl.argmax(left, 1)  # of equal shares the first
            left = tl.where(column[None, :] == expert[:, None], -float("inf"), left)
        is_hit = is_real[:, None] & (left == -float("inf"))
        hits += tl.sum(is_hit.to(tl.int32), 0)
        part += tl.sum(tl.where(is_real[:, None], share, 0.0), 0)
    at = (row * tl.num_programs(0) + tl.program_id(0)) * E + column
    tl.store(part_ptr + at, part, mask=column < E)
    tl.store(hits_ptr + at, hits, mask=column < E)


@triton.jit
def _add_up(
    part_ptr,
    hits_ptr,
    sums_ptr,
    load_ptr,
    blocks,
    E: tl.constexpr,
    BLOCKS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    part = tl.zeros([BLOCKS, EXPERTS], tl.float32)
    hits = tl.zeros([BLOCKS, EXPERTS], tl.int32)
    for start in tl.range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        inside = (block < blocks)[:, None] & (expert < E)[None, :]
        at = (row * blocks + block)[:, None] * E + expert[None, :]
        part += tl.load(part_ptr + at, mask=inside, other=0.0)
        hits += tl.load(hits_ptr + at, mask=inside, other=0)
    at = row * E + expert
    tl.store(sums_ptr + at, tl.sum(part, 0), mask=expert < E)
    tl.store(load_ptr + at, tl.sum(hits, 0).to(tl.float32), mask=expert < E)


@triton.jit
def _backward(
    scores_ptr,
    padding_ptr,
    grad_sums_ptr,
    grad_ptr,
    tokens,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (token < tokens)[:, None] & (column < E)[None, :]
    at = (row * tokens + token)[:, None] * E + column[None, :]
    scores = tl.load(scores_ptr + at, mask=inside, other=0.0)
    slope = tl.load(grad_sums_ptr + row * E + column, mask=column < E, other=0.0)[None, :]
    total = tl.sum(scores, 1) + 1e-20
    mean = tl.sum(slope * scores, 1) / total
    grad = (slope - mean[:, None]) / total[:, None]
    if PADDED:
        is_padding = tl.load(padding_ptr + row * tokens + token, mask=token < tokens, other=1)
        grad = tl.where((is_padding == 0)[:, None], grad, 0.0)
    tl.store(grad_ptr + at, grad, mask=inside)


_parts_on, _add_up_on, _backward_on = map(Launcher, (_parts, _add_up, _backward))


class _BalanceSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, padding: Tensor | None, num_rows: int, top_k: int
    ) -> tuple[Tensor, Tensor]:
        scores = scores.contiguous()
        tokens, size = scores.shape[0] // num_rows, scores.shape[1]
        if padding is not None:
            padding = padding.contiguous().view(torch.uint8)
        columns = power_of_2(size)
        height = rows_of_a_block(ELEMENTS, columns)
        steps = max(1, TOKENS // height)
        blocks = triton.cdiv(tokens, height * steps)
        part = scores.new_empty(num_rows, blocks, size)
        hits = torch.empty_like(part, dtype=torch.int32)
        sums, load = (scores.new_empty(num_rows, size) for _ in range(2))
        _parts_on(
            (blocks, num_rows, 1),
            (scores, hits if padding is None else padding, part, hits),
            (tokens,),
            (size, top_k, height, steps, columns, padding is not None),
            num_warps=4,
        )
        _add_up_on(
            (triton.cdiv(size, EXPERTS), num_rows, 1),
            (part, hits, sums, load),
            (blocks,),
            (size, BLOCKS, EXPERTS),
            num_warps=4,
        )
        ctx.save_for_backward(scores, padding)
        ctx.num_rows = num_rows
        ctx.mark_non_differentiable(load)
        return sums, load

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sums: Tensor, _: None) -> tuple[Tensor | None, ...]:
        scores, padding = ctx.saved_tensors
        tokens, size = scores.shape[0] // ctx.num_rows, scores.shape[1]
        columns = power_of_2(size)
        height = rows_of_a_block(ELEMENTS, columns)
        grad = torch.empty_like(scores)
        _backward_on(
            (triton.cdiv(tokens, height), ctx.num_rows, 1),
            (scores, scores if padding is None else padding, grad_sums.contiguous(), grad),
            (tokens,),
            (size, height, columns, padding is not None),
            num_warps=4,
        )
        return grad, None, None, None


def balance_sums(
    scores: Float[Tensor, "M E"], padding: Bool[Tensor, "B T"] | None, num_rows: int, top_k: int
) -> tuple[Float[Tensor, "B E"], Float[Tensor, "B E"]]:
    """The reference's sums in float32, of fixed parts in a fixed order."""
    return _BalanceSums.apply(scores, padding, num_rows, top_k)
