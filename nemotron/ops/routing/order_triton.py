"""A stable counting sort of copies by expert, in three Triton launches without a wait."""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron.ops.launch import Launcher, power_of_2

BLOCK, PART = 256, 64
"""Copies of a program, and how many of them are compared with all others at a time."""
BLOCKS, EXPERTS = 256, 8
"""Blocks and experts of a tile when the blocks' counts are added up."""


@triton.jit
def _ranks(
    experts_ptr,
    rank_ptr,
    first_ptr,
    copies,
    E: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    """Number each expert's copies within a block, and count them."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    number = tl.arange(0, BLOCK)
    experts = tl.load(experts_ptr + start + number, mask=start + number < copies, other=-1)
    experts = experts.to(tl.int32)
    rank = tl.zeros([BLOCK], tl.int32)
    for begin in tl.static_range(0, BLOCK, PART):
        other = begin + tl.arange(0, PART)
        earlier = tl.load(experts_ptr + start + other, mask=start + other < copies, other=-1)
        is_before = (earlier.to(tl.int32)[None, :] == experts[:, None]) & (
            other[None, :] < number[:, None]
        )
        rank += tl.sum(is_before.to(tl.int32), 1)
    tl.store(rank_ptr + start + number, rank, mask=start + number < copies)
    counts = tl.histogram(experts, BINS, mask=start + number < copies)
    expert = tl.arange(0, BINS)
    tl.store(first_ptr + tl.program_id(0).to(tl.int64) * E + expert, counts, mask=expert < E)


@triton.jit
def _first_rows(
    first_ptr,
    rows_ptr,
    blocks,
    E: tl.constexpr,
    BINS: tl.constexpr,
    BLOCKS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Turn the counts of each block into the row of its first copy for each expert."""
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    every = tl.arange(0, BINS)
    rows = tl.load(rows_ptr + every, mask=every < E, other=0).to(tl.int32)
    is_before = every[None, :] < expert[:, None]
    before = tl.sum(tl.where(is_before, rows[None, :], 0), 1)
    for start in tl.range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        inside = (block < blocks)[:, None] & (expert < E)[None, :]
        at = first_ptr + block.to(tl.int64)[:, None] * E + expert[None, :]
        here = tl.load(at, mask=inside, other=0)
        tl.store(at, before[None, :] + tl.cumsum(here, 0) - here, mask=inside)
        before += tl.sum(here, 0)


@triton.jit
def _scatter(
    weights_ptr,
    experts_ptr,
    token_ptr,
    rank_ptr,
    first_ptr,
    row_weights_ptr,
    ordered_ptr,
    place_ptr,
    starts_ptr,
    copies,
    tokens,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Put each copy into its row, and note where each token's copies begin."""
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_copy = number < copies
    token = tl.load(token_ptr + number, mask=is_copy, other=0)
    expert = tl.load(experts_ptr + number, mask=is_copy, other=0)
    first = tl.load(first_ptr + number // BLOCK * E + expert, mask=is_copy, other=0)
    row = (first + tl.load(rank_ptr + number, mask=is_copy, other=0)).to(tl.int64)
    weight = tl.load(weights_ptr + number, mask=is_copy, other=0.0)
    tl.store(row_weights_ptr + row, weight, mask=is_copy)
    tl.store(ordered_ptr + row, token, mask=is_copy)
    tl.store(place_ptr + number, row, mask=is_copy)
    # tokens between those of two copies have none, nor have any behind the last copy's
    token = tl.where(is_copy, token, tokens - 1)
    has_last = (number > 0) & (number <= copies)
    last = tl.load(token_ptr + number - 1, mask=has_last, other=-1)
    gap = tl.where(number <= copies, token - last, 0)
    for step in tl.range(0, tl.max(gap).to(tl.int32)):
        tl.store(starts_ptr + last + 1 + step, number, mask=step < gap)


_ranks_on, _first_rows_on, _scatter_on = map(Launcher, (_ranks, _first_rows, _scatter))


class _ExpertOrder(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weights: Tensor,
        experts: Tensor,
        token: Tensor,
        rows: Tensor,
        num_tokens: int,
        num_rows: int,
    ) -> tuple[Tensor, ...]:
        weights, experts, token = weights.contiguous(), experts.contiguous(), token.contiguous()
        copies, size = experts.shape[0], rows.shape[0]
        # rows of padding are written nowhere below
        new = torch.empty if num_rows == copies else torch.zeros
        row_weights, ordered = (
            new(num_rows, dtype=t.dtype, device=t.device) for t in (weights, token)
        )
        place, starts = torch.empty_like(experts), token.new_empty(num_tokens)
        rank = experts.new_empty(copies, dtype=torch.int32)
        blocks = triton.cdiv(copies, BLOCK)
        first = experts.new_empty(blocks, size, dtype=torch.int32)
        bins = power_of_2(size)
        if copies:
            _ranks_on(
                (blocks, 1, 1),
                (experts, rank, first),
                (copies,),
                (size, bins, BLOCK, PART),
                num_warps=8,
            )
            _first_rows_on(
                (triton.cdiv(size, EXPERTS), 1, 1),
                (first, rows.contiguous()),
                (blocks,),
                (size, bins, BLOCKS, EXPERTS),
                num_warps=4,
            )
        _scatter_on(
            (copies // BLOCK + 1, 1, 1),
            (weights, experts, token, rank, first, row_weights, ordered, place, starts),
            (copies, num_tokens),
            (size, BLOCK),
            num_warps=4,
        )
        ctx.save_for_backward(place)
        ctx.mark_non_differentiable(ordered, place, starts)
        return row_weights, ordered, place, starts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        return grad.index_select(0, place), None, None, None, None, None


def expert_order(
    weights: Float[Tensor, " copies"],
    experts: Int[Tensor, " copies"],
    token: Int[Tensor, " copies"],
    counts: Int[Tensor, " E"],
    num_tokens: int,
    multiple: int,
) -> tuple[Tensor, ...]:
    """The reference's numbers; blocks of copies are counted, added up and then put into place."""
    rows = counts if multiple == 1 else (counts + multiple - 1) // multiple * multiple
    num_rows = experts.shape[0] if multiple == 1 else int(rows.sum())
    return *_ExpertOrder.apply(weights, experts, token, rows, num_tokens, num_rows), rows
