"""The choice of experts by Triton kernels, one launch each way; a row's scores lie in registers."""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron.ops.launch import Launcher, power_of_2
from nemotron.ops.rms_norm.triton import as_rows, rows_of_a_block

ELEMENTS, WARPS = 2048, 4
"""Scores of a program: 512 a warp, and passes over a row are reductions inside of one."""


@triton.jit
def _forward(
    logits_ptr,
    bias_ptr,
    given_ptr,
    scores_ptr,
    weights_ptr,
    experts_ptr,
    counts_ptr,
    rows,
    logits_stride,
    E: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PLACES: tl.constexpr,
    GIVEN: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SCALING: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    place = tl.arange(0, PLACES)
    in_rows = row < rows
    inside = in_rows[:, None] & (column < E)[None, :]
    at = logits_ptr + row[:, None] * logits_stride + column[None, :]
    scores = _sigmoid(tl.load(at, mask=inside, other=0.0).to(tl.float32))
    tl.store(scores_ptr + row[:, None] * E + column[None, :], scores, mask=inside)
    bias = tl.load(bias_ptr + column, mask=column < E, other=0.0).to(tl.float32)
    left = tl.where((column < E)[None, :], scores + bias[None, :], -float("inf"))
    # NaN counts as the largest, as in torch
    left = tl.where(left == left, left, float("inf"))
    experts = tl.zeros([ROWS, PLACES], tl.int32)
    chosen = tl.zeros([ROWS, PLACES], tl.float32)
    for k in tl.static_range(K):
        if GIVEN:
            expert = tl.load(given_ptr + row * K + k, mask=in_rows, other=0).to(tl.int32)
        else:
            expert = tl.argmax(left, 1)  # of equal scores the first
            left = tl.where(column[None, :] == expert[:, None], -float("inf"), left)
        logit = tl.load(logits_ptr + row * logits_stride + expert, mask=in_rows, other=0.0)
        here = place[None, :] == k
        experts = tl.where(here, expert[:, None], experts)
        chosen = tl.where(here, _sigmoid(logit.to(tl.float32))[:, None], chosen)
    if NORMALIZE:
        chosen = chosen / (tl.sum(chosen, 1) + 1e-20)[:, None]
    inside = in_rows[:, None] & (place < K)[None, :]
    at = row[:, None] * K + place[None, :]
    tl.store(weights_ptr + at, chosen * SCALING, mask=inside)
    tl.store(experts_ptr + at, experts.to(tl.int64), mask=inside)
    one = tl.full([ROWS, PLACES], 1, tl.int64)
    tl.atomic_add(counts_ptr + experts, one, mask=inside, sem="relaxed")


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _backward(
    scores_ptr,
    experts_ptr,
    grad_weights_ptr,
    grad_scores_ptr,
    grad_ptr,
    rows,
    E: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PLACES: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SCALING: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    in_rows = row < rows
    inside = in_rows[:, None] & (column < E)[None, :]
    at = row[:, None] * E + column[None, :]
    scores = tl.load(scores_ptr + at, mask=inside, other=0.0)
    slope = tl.zeros([ROWS, COLUMNS], tl.float32)
    if HAS_SCORES:
        slope += tl.load(grad_scores_ptr + at, mask=inside, other=0.0)
    if HAS_WEIGHTS:
        factor = tl.full([ROWS], SCALING, tl.float32)
        mean = tl.zeros([ROWS], tl.float32)
        if NORMALIZE:
            place = tl.arange(0, PLACES)
            is_place = in_rows[:, None] & (place < K)[None, :]
            at_place = row[:, None] * K + place[None, :]
            expert = tl.load(experts_ptr + at_place, mask=is_place, other=0)
            chosen = tl.load(scores_ptr + row[:, None] * E + expert, mask=is_place, other=0.0)
            grad = tl.load(grad_weights_ptr + at_place, mask=is_place, other=0.0)
            total = tl.sum(chosen, 1) + 1e-20
            mean = tl.sum(grad * chosen, 1) / total
            factor /= total
        for k in tl.static_range(K):
            expert = tl.load(experts_ptr + row * K + k, mask=in_rows, other=0).to(tl.int32)
            grad_k = tl.load(grad_weights_ptr + row * K + k, mask=in_rows, other=0.0)
            more = factor * (grad_k - mean)
            slope = tl.where(column[None, :] == expert[:, None], slope + more[:, None], slope)
    slope *= scores * (1.0 - scores)
    tl.store(grad_ptr + at, slope.to(grad_ptr.dtype.element_ty), mask=inside)


_forward_on, _backward_on = Launcher(_forward), Launcher(_backward)


class _TopkRouting(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        bias: Tensor,
        given: Tensor | None,
        top_k: int,
        normalize: bool,
        scaling: float,
    ) -> tuple[Tensor, ...]:
        logits = as_rows(logits)
        rows, size = logits.shape
        scores = logits.new_empty(rows, size, dtype=torch.float32)
        weights = logits.new_empty(rows, top_k, dtype=torch.float32)
        experts = logits.new_empty(rows, top_k, dtype=torch.int64)
        counts = logits.new_zeros(size, dtype=torch.int64)
        columns = power_of_2(size)
        height = rows_of_a_block(ELEMENTS, columns)
        if rows:
            _forward_on(
                (triton.cdiv(rows, height), 1, 1),
                (
                    logits,
                    bias,
                    experts if given is None else given.contiguous(),
                    scores,
                    weights,
                    experts,
                    counts,
                ),
                (rows, logits.stride(0)),
                (
                    *(size, top_k, height, columns, power_of_2(top_k)),
                    *(given is not None, normalize, scaling),
                ),
                num_warps=WARPS,
            )
        ctx.save_for_backward(scores, experts)
        ctx.dtype, ctx.normalize, ctx.scaling = logits.dtype, normalize, scaling
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(experts, counts)
        return weights, scores, experts, counts

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_weights: Tensor | None, grad_scores: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        scores, experts = ctx.saved_tensors
        rows, size = scores.shape
        top_k = experts.shape[1]
        grad = scores.new_empty(rows, size, dtype=ctx.dtype)
        columns = power_of_2(size)
        height = rows_of_a_block(ELEMENTS, columns)
        if rows:
            _backward_on(
                (triton.cdiv(rows, height), 1, 1),
                (
                    scores,
                    experts,
                    scores if grad_weights is None else grad_weights.contiguous(),
                    scores if grad_scores is None else grad_scores.contiguous(),
                    grad,
                ),
                (rows,),
                (
                    *(size, top_k, height, columns, power_of_2(top_k)),
                    *(grad_weights is not None, grad_scores is not None),
                    *(ctx.normalize, ctx.scaling),
                ),
                num_warps=WARPS,
            )
        return grad, None, None, None, None, None


def topk_routing(
    logits: Float[Tensor, "M E"],
    bias: Float[Tensor, " E"],
    given: Int[Tensor, "M K"] | None,
    top_k: int,
    num_groups: int,
    top_groups: int,
    normalize: bool,
    scaling: float,
) -> tuple[Float[Tensor, "M K"], Float[Tensor, "M E"], Int[Tensor, "M K"], Int[Tensor, " E"]]:
    """The reference's formulas in float32; of equal scores the expert of the lower number wins."""
    assert num_groups == 1, num_groups
    return _TopkRouting.apply(logits, bias, given, top_k, normalize, scaling)
