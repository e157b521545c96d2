"""The routed experts of a few tokens: of all matrices, the chosen experts' alone are read."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.registry import Backend, Operation, triton_backend

MOST_COPIES = 512
"""Tokens times experts of each that the kernels take; beyond, products by groups are as fast."""


class ExpertStepOp(Operation):
    """Add up, for each token, w down(relu(up(x))²) of its experts, each with its weight w.

    As in training, the weight is applied before the projection down, which then rounds its input to
    the dtype of `x`. Sums are taken in float32 or wider, over a token's experts in their order, and
    rounded once; `shared` is added before that. Without gradients.
    """

    def __call__(
        self,
        x: Float[Tensor, "M I"],
        experts: Int[Tensor, "M K"],
        weights: Float[Tensor, "M K"],
        up: Float[Tensor, "E F I"],
        down: Float[Tensor, "E I F"],
        shared: Float[Tensor, "M I"] | None = None,
    ) -> Float[Tensor, "M I"]:
        function = self.select(x, sizes=(experts.numel(),))
        return function(x, experts, weights, up, down, shared)


def reference(
    x: Float[Tensor, "M I"],
    experts: Int[Tensor, "M K"],
    weights: Float[Tensor, "M K"],
    up: Float[Tensor, "E F I"],
    down: Float[Tensor, "E I F"],
    shared: Float[Tensor, "M I"] | None,
) -> Float[Tensor, "M I"]:
    """One expert of every token after the other."""
    wide = torch.promote_types(x.dtype, weights.dtype)
    total = torch.zeros(x.shape, dtype=wide, device=x.device)
    for chosen, weight in zip(experts.unbind(1), weights.unbind(1), strict=True):
        hidden = torch.einsum("mi,mfi->mf", x.to(wide), up[chosen].to(wide))
        hidden = (hidden.relu().square() * weight[:, None]).to(x.dtype)
        total = total + torch.einsum("mf,mif->mi", hidden.to(wide), down[chosen].to(wide))
    return (total if shared is None else total + shared).to(x.dtype)


def _limit(copies: int) -> str | None:
    if copies <= MOST_COPIES:
        return None
    return f"takes {MOST_COPIES} copies of tokens at most, not {copies}"


expert_step = ExpertStepOp(
    "expert_step",
    [
        triton_backend(
            "nemotron.ops.expert_step.triton",
            "expert_step",
            by_name=True,  # has not run on a GPU yet
            limit=_limit,
        ),
        Backend("reference", reference),
    ],
)
