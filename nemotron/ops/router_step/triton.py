"""A router's choice for a few tokens by two Triton kernels: partial products, then the rest.

The first cuts the long sums in pieces, so that there are programs for all multiprocessors; the
second adds up the pieces in one order.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from nemotron.ops import launch
from nemotron.ops.router_step import Found

LOG2_E = tl.constexpr(launch.LOG2_E)
LOWEST = tl.constexpr(-3e38)
"""Below every score, and above what is chosen already."""

EXPERTS, INPUTS, TOKENS = 64, 128, 16
"""Of a piece of the product."""


@triton.jit(do_not_specialize=["M"])
def _multiply(
    x_ptr,
    weight_ptr,
    parts_ptr,
    counts_ptr,
    M,
    x_stride,
    D: tl.constexpr,
    E: tl.constexpr,
    IN_PARTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    INPUTS: tl.constexpr,
    TOKENS: tl.constexpr,
    DOT: tl.constexpr,
):
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    piece = tl.program_id(1)
    if (piece == 0) & (tl.program_id(2) == 0):
        # the next launch counts
        tl.store(counts_ptr + expert, tl.zeros([EXPERTS], tl.int64), mask=expert < E)
    inner = piece * INPUTS + tl.arange(0, INPUTS)
    inside = (expert < E)[:, None] & (inner < D)[None, :]
    at = weight_ptr + expert[:, None] * D + inner[None, :]
    weight = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    inside = (inner < D)[:, None] & (token < M)[None, :]
    at = x_ptr + token.to(tl.int64)[None, :] * x_stride + inner[:, None]
    x = tl.load(at, mask=inside, other=0.0).to(DOT)
    if IN_PARTS:
        # a float32 number is the sum of three bfloat16 numbers, whose products are exact in float32
        high = weight.to(tl.bfloat16)
        rest = weight - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(low.to(DOT), x, input_precision="ieee")
        total = tl.dot(middle.to(DOT), x, total, input_precision="ieee")
        total = tl.dot(high.to(DOT), x, total, input_precision="ieee")
    else:
        total = tl.dot(weight, x, input_precision="ieee")
    at = parts_ptr + (piece * M + token)[None, :] * E + expert[:, None]
    tl.store(at, total, mask=(expert < E)[:, None] & (token < M)[None, :])


@triton.jit(do_not_specialize=["M"])
def _choose(
    parts_ptr,
    bias_ptr,
    scores_ptr,
    experts_ptr,
    weights_ptr,
    counts_ptr,
    M,
    scaling,
    E: tl.constexpr,
    LANES: tl.constexpr,
    NUM_PIECES: tl.constexpr,
    PIECES: tl.constexpr,
    K: tl.constexpr,
    PLACES: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside = lane < E
    piece = tl.arange(0, PIECES)
    at = parts_ptr + (piece[:, None] * M + token) * E + lane[None, :]
    present = (piece < NUM_PIECES)[:, None] & inside[None, :]
    logits = tl.sum(tl.load(at, mask=present, other=0.0), 0)
    scores = 1 / (1 + tl.exp2(-logits * LOG2_E))
    tl.store(scores_ptr + token * E + lane, scores, mask=inside)
    biased = scores + tl.load(bias_ptr + lane, mask=inside, other=0.0).to(tl.float32)
    # what is not a number comes last and must not leave the table
    left = tl.where(biased > LOWEST, biased, LOWEST)
    left = tl.where(inside, left, -float("inf"))
    place = tl.arange(0, PLACES)
    chosen = tl.zeros([PLACES], tl.int32)
    weights = tl.zeros([PLACES], tl.float32)
    for k in tl.range(0, K):
        best = tl.argmax(left, 0, tie_break_left=True)
        is_best = lane == best
        weight = tl.sum(tl.where(is_best, scores, 0.0), 0)
        chosen = tl.where(place == k, best, chosen)
        weights = tl.where(place == k, weight, weights)
        left = tl.where(is_best, -float("inf"), left)
    if NORMALIZE:
        weights = weights / (tl.sum(weights, 0) + 1e-20)
    at = token * K + place
    tl.store(experts_ptr + at, chosen.to(tl.int64), mask=place < K)
    tl.store(weights_ptr + at, weights * scaling, mask=place < K)
    one = tl.full([PLACES], 1, tl.int64)
    tl.atomic_add(counts_ptr + chosen, one, mask=place < K, sem="relaxed")


def router_step(
    x: Float[Tensor, "M D"],
    weight: Float[Tensor, "E D"],
    bias: Float[Tensor, " E"],
    top_k: int,
    scaling: float,
    normalize: bool,
) -> Found:
    """The reference's formulas in float32; of equal scores, the expert with the lower number."""
    (tokens, size), num_experts = x.shape, weight.shape[0]
    assert x.stride(1) == 1, x.stride()
    pieces = triton.cdiv(size, INPUTS)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    parts, scores = empty(pieces, tokens, num_experts), empty(tokens, num_experts)
    experts, weights = empty(tokens, top_k, dtype=torch.int64), empty(tokens, top_k)
    if not tokens:
        return scores, experts, weights, experts.new_zeros(num_experts)
    counts = empty(num_experts, dtype=torch.int64)
    _multiply[(triton.cdiv(num_experts, EXPERTS), pieces, triton.cdiv(tokens, TOKENS))](
        x,
        weight.contiguous(),
        parts,
        counts,
        tokens,
        x.stride(0),
        D=size,
        E=num_experts,
        IN_PARTS=x.dtype == torch.bfloat16,
        EXPERTS=EXPERTS,
        INPUTS=INPUTS,
        TOKENS=TOKENS,
        DOT=launch.dot_type(x.dtype),
        num_warps=4,
    )
    _choose[(tokens,)](
        parts,
        bias,
        scores,
        experts,
        weights,
        counts,
        tokens,
        scaling,
        E=num_experts,
        LANES=launch.power_of_2(num_experts),
        NUM_PIECES=pieces,
        PIECES=launch.power_of_2(pieces),
        K=top_k,
        PLACES=launch.power_of_2(top_k),
        NORMALIZE=normalize,
        num_warps=4 if num_experts <= 128 else 8,
    )
    return scores, experts, weights, counts
