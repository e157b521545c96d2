"""Head and cross entropy over chunks of tokens: the logits of a whole batch never exist."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.registry import Backend

CHUNK_ELEMENTS = 1 << 21
"""Logits that exist at a time; 8 MB in float32."""
IGNORED = -100

CrossEntropy = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]
"""`cross_entropy` below, or what takes its place where ranks share the vocabulary."""


def cross_entropy(
    logits: Float[Tensor, "M V"], target: Int[Tensor, "M 1"], needs_slope: bool
) -> tuple[Float[Tensor, "M 1"], Float[Tensor, "M V"] | None]:
    """Return the loss of each row and, if needed, its slope, which overwrites the logits."""
    shift = logits.logsumexp(1, keepdim=True)
    losses = shift - logits.gather(1, target)
    if not needs_slope:
        return losses, None
    slope = logits.sub_(shift).exp_()  # softmax
    return losses, slope.scatter_add_(1, target, slope.new_full(target.shape, -1.0))


class _SummedLoss(torch.autograd.Function):
    """The gradient is computed with the loss, while the logits are at hand, and scaled later."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        cross_entropy: CrossEntropy,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        kept = (labels != IGNORED).nonzero().squeeze(1)
        everything = kept.shape[0] == labels.shape[0]
        matrix = weight.to(hidden.dtype)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for rows in kept.split(_chunk(weight)):
            part = hidden[rows[0] : rows[-1] + 1] if everything else hidden[rows]
            logits = torch.mm(part, matrix.T).to(wide)
            losses, slope = cross_entropy(
                logits, labels[rows].unsqueeze(1), needs_hidden or needs_weight
            )
            share = None if weights is None else weights[rows].unsqueeze(1)
            total += (losses if share is None else losses * share).sum()
            if slope is None:
                continue
            if share is not None:
                slope *= share
            narrow = slope.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = torch.mm(narrow, matrix)
            if grad_weight is not None:
                if hidden.dtype == wide:
                    grad_weight.addmm_(narrow.T, part)
                else:
                    # the head's gradient is summed in float32 over the chunks
                    grad_weight += torch.mm(narrow.T, part)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


class _LossPerToken(torch.autograd.Function):
    """The logits of a chunk are computed again for its gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, labels)
        matrix = weight.to(hidden.dtype)
        parts = []
        for part, target in zip(_split(hidden, weight), _split(labels, weight), strict=True):
            logits = torch.mm(part, matrix.T).to(torch.promote_types(part.dtype, torch.float32))
            picked = logits.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1)
            parts.append((logits.logsumexp(1) - picked).masked_fill_(target == IGNORED, 0))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, labels = ctx.saved_tensors
        with torch.enable_grad():
            leaf, matrix = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
            kept = grad.masked_fill(labels == IGNORED, 0)
            for part, target, share in zip(
                *(_split(t, weight) for t in (leaf, labels, kept)), strict=True
            ):
                logits = torch.mm(part, matrix.to(part.dtype).T).to(share.dtype)
                picked = logits.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1)
                ((logits.logsumexp(1) - picked) * share).sum().backward()
        return leaf.grad, matrix.grad, None


def _chunk(weight: Tensor) -> int:
    return max(64, CHUNK_ELEMENTS // weight.shape[0])


def _split(values: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return values.split(_chunk(weight))


def summed_loss(
    hidden: Float[Tensor, "M D"],
    weight: Float[Tensor, "V D"],
    labels: Int[Tensor, " M"],
    weights: Float[Tensor, " M"] | None,
    cross_entropy: CrossEntropy = cross_entropy,
) -> Float[Tensor, ""]:
    """Return the sum of the weighted losses; `cross_entropy` decides what a row's loss is."""
    return _SummedLoss.apply(hidden, weight, labels, weights, cross_entropy)


def linear_cross_entropy(
    hidden: Float[Tensor, "M D"],
    weight: Float[Tensor, "V D"],
    labels: Int[Tensor, " M"],
    reduction: Literal["sum", "none"],
    weights: Float[Tensor, " M"] | None = None,
) -> Tensor:
    """The reference's loss, chunk by chunk."""
    if reduction == "sum":
        return summed_loss(hidden, weight, labels, weights)
    losses = _LossPerToken.apply(hidden, weight, labels)
    return losses if weights is None else losses * weights


backend = Backend("chunked", linear_cross_entropy)
