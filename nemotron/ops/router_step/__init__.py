"""The experts of a few tokens and their weights, as the router of a mixture layer chooses them."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.registry import Backend, Operation, triton_backend

MOST_TOKENS = 64
"""That the kernels take; beyond, their partial sums are as many bytes as the steps of a router."""


Found = tuple[Float[Tensor, "M E"], Int[Tensor, "M K"], Float[Tensor, "M K"], Int[Tensor, " E"]]


class RouterStepOp(Operation):
    """Return a sigmoid router's scores, chosen experts, their weights, and tokens of each expert.

    The best `top_k` of sigmoid(x weightᵀ) + `bias` are chosen, the best first. They are weighed by
    their scores without the bias, divided by the sum of these where `normalize` is set, times
    `scaling`. Both are float32 or wider, and the product is that of `wide_linear`: neither side is
    rounded. Without gradients.
    Source: NVIDIA/Megatron-LM: megatron/core/transformer/moe/router.py.
    """

    def __call__(
        self,
        x: Float[Tensor, "M D"],
        weight: Float[Tensor, "E D"],
        bias: Float[Tensor, " E"],
        top_k: int,
        scaling: float,
        *,
        normalize: bool,
    ) -> Found:
        function = self.select(x, sizes=(x.shape[0],))
        return function(x, weight, bias, top_k, scaling, normalize)


def reference(
    x: Float[Tensor, "M D"],
    weight: Float[Tensor, "E D"],
    bias: Float[Tensor, " E"],
    top_k: int,
    scaling: float,
    normalize: bool,
) -> Found:
    """Score, choose, weigh."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    scores = (x.to(wide) @ weight.to(wide).T).sigmoid()
    experts = (scores + bias).topk(top_k, dim=-1).indices
    weights = scores.gather(1, experts)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    counts = experts.flatten().bincount(minlength=weight.shape[0])
    return scores, experts, weights * scaling, counts


def _limit(tokens: int) -> str | None:
    if tokens <= MOST_TOKENS:
        return None
    return f"takes {MOST_TOKENS} tokens at most, not {tokens}"


router_step = RouterStepOp(
    "router_step",
    [
        triton_backend(
            "nemotron.ops.router_step.triton",
            "router_step",
            by_name=True,  # has not run on a GPU yet
            limit=_limit,
        ),
        Backend("reference", reference),
    ],
)
