"""Language-model head and cross entropy in one."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron.device import cpu_multiplies_bfloat16
from nemotron.ops.registry import Backend, Operation, numba_backend, triton_backend

CHUNK_ELEMENTS = 1 << 21
"""Logits that exist at a time on a CPU; 8 MB in float32."""
GPU_CHUNK_ELEMENTS = 1 << 28
"""The same on a GPU, where fewer than about 2048 rows at a time leave the products unbusy."""
IGNORED = -100

CrossEntropy = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]
"""`cross_entropy` below, or what takes its place where ranks share the vocabulary."""


class LinearCrossEntropyOp(Operation):
    """Return the cross entropy of softmax(hidden @ weightᵀ) in nats, float32.

    Labels of -100 contribute nothing; the loss of each other label is multiplied by its weight,
    which gets no gradient. `sum` gives a scalar, `none` one value per row.
    """

    def __call__(
        self,
        hidden: Float[Tensor, "M D"],
        weight: Float[Tensor, "V D"],
        labels: Int[Tensor, " M"],
        weights: Float[Tensor, " M"] | None = None,
        *,
        reduction: Literal["sum", "none"] = "sum",
    ) -> Tensor:
        return self.select(hidden)(hidden, weight, labels, reduction, weights)


def reference(
    hidden: Float[Tensor, "M D"],
    weight: Float[Tensor, "V D"],
    labels: Int[Tensor, " M"],
    reduction: Literal["sum", "none"],
    weights: Float[Tensor, " M"] | None = None,
) -> Tensor:
    """Cross entropy of hidden @ weightᵀ in float32 or wider."""
    logits = hidden @ weight.to(hidden.dtype).T
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(wide, labels, ignore_index=IGNORED, reduction="none")
    if weights is not None:
        losses = losses * weights
    return losses.sum() if reduction == "sum" else losses


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
        recorded: bool,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        # without a record, a parameter would still ask for its gradient
        needs_hidden, needs_weight = (recorded and needs for needs in ctx.needs_input_grad[:2])
        matrix = weight.to(hidden.dtype)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for rows, target, share in _chunks(labels, weights, _chunk(weight)):
            part = hidden[rows]
            logits = torch.mm(part, matrix.T).to(wide)
            losses, slope = cross_entropy(logits, target.unsqueeze(1), needs_hidden or needs_weight)
            share = None if share is None else share.unsqueeze(1)
            total += (losses if share is None else losses * share).sum()
            if slope is None:
                continue
            if share is not None:
                slope *= share
            narrow = slope.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = torch.mm(narrow, matrix)
            if grad_weight is not None:
                add_product(grad_weight, narrow.T, part)
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
        return grad_hidden, grad_weight, None, None, None, None


class _LossPerToken(torch.autograd.Function):
    """The logits of a chunk are computed again for its gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, cross_entropy: CrossEntropy
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, labels)
        ctx.cross_entropy = cross_entropy
        matrix = weight.to(hidden.dtype)
        parts = []
        for part, target in zip(_split(hidden, weight), _split(labels, weight), strict=True):
            logits = torch.mm(part, matrix.T).to(torch.promote_types(part.dtype, torch.float32))
            losses, _ = cross_entropy(logits, target.clamp(min=0).unsqueeze(1), False)
            parts.append(losses.squeeze(1).masked_fill(target == IGNORED, 0))
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        matrix = weight.to(hidden.dtype)
        grad_hidden, grad_weight = list[Tensor](), None
        kept = grad.masked_fill(labels == IGNORED, 0)
        for part, target, share in zip(
            *(_split(t, weight) for t in (hidden, labels, kept)), strict=True
        ):
            logits = torch.mm(part, matrix.T).to(share.dtype)
            _, slope = ctx.cross_entropy(logits, target.clamp(min=0).unsqueeze(1), True)
            narrow = slope.mul_(share.unsqueeze(1)).to(hidden.dtype)
            if needs_hidden:
                grad_hidden.append(torch.mm(narrow, matrix))
            if needs_weight:
                grad_weight = add_product(grad_weight, narrow.T, part)
        return (
            torch.cat(grad_hidden) if needs_hidden else None,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None,
            None,
        )


Rows = slice | Int[Tensor, " rows"]


Chunk = tuple[Rows, Int[Tensor, " rows"], Float[Tensor, " rows"] | None]
"""Rows with their labels and weights."""


def _chunks(labels: Tensor, weights: Tensor | None, size: int) -> Iterator[Chunk]:
    # to find the rows that have a label, the host would have to wait for a GPU
    find = labeled_rows if labels.device.type == "cpu" else all_rows
    return find(labels, weights, size)


def labeled_rows(
    labels: Int[Tensor, " M"], weights: Float[Tensor, " M"] | None, size: int
) -> Iterator[Chunk]:
    """Yield the rows that have a label, `size` at a time."""
    kept = (labels != IGNORED).nonzero().squeeze(1)
    everything = kept.shape[0] == labels.shape[0]
    for rows in kept.split(size):
        share = None if weights is None else weights[rows]
        yield slice(rows[0], rows[-1] + 1) if everything else rows, labels[rows], share


def all_rows(
    labels: Int[Tensor, " M"], weights: Float[Tensor, " M"] | None, size: int
) -> Iterator[Chunk]:
    """Yield all rows, `size` at a time; those without a label weigh 0 and get some label."""
    ignored = labels == IGNORED
    if weights is None:
        weights = torch.ones(labels.shape, dtype=torch.float32, device=labels.device)
    shares, targets = weights.masked_fill(ignored, 0), labels.masked_fill(ignored, 0)
    for start in range(0, labels.shape[0], size):
        rows = slice(start, start + size)
        yield rows, targets[rows], shares[rows]


def add_product(
    total: Float[Tensor, "V D"] | None, a: Float[Tensor, "V M"], b: Float[Tensor, "M D"]
) -> Float[Tensor, "V D"]:
    """Add a @ b to a sum in float32 or wider, in place; None begins a sum."""
    wide = torch.promote_types(a.dtype, torch.float32)
    direct = a.device.type == "cuda" and a.dtype != wide  # only there torch can widen the product
    if total is None:
        return torch.mm(a, b, out_dtype=wide) if direct else torch.mm(a, b).to(wide)
    if direct:
        return torch.addmm(total, a, b, out_dtype=wide, out=total)
    if a.dtype == wide:
        return total.addmm_(a, b)
    return total.add_(torch.mm(a, b))


def _chunk(weight: Tensor) -> int:
    elements = CHUNK_ELEMENTS if weight.device.type == "cpu" else GPU_CHUNK_ELEMENTS
    return max(64, elements // weight.shape[0])


def _split(values: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return values.split(_chunk(weight))


class _RoundedInFloat32(torch.autograd.Function):
    """The gradient passes as it is: float32, never rounded to bfloat16."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return weight.to(dtype).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def widened(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return x and a weight as they are, or both in float32 where this CPU does not multiply x.

    The weight is then rounded to the dtype of x first. What follows a product stays float32.
    """
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or cpu_multiplies_bfloat16():
        return x, weight
    return x.float(), _RoundedInFloat32.apply(weight, x.dtype)


def summed_loss(
    hidden: Float[Tensor, "M D"],
    weight: Float[Tensor, "V D"],
    labels: Int[Tensor, " M"],
    weights: Float[Tensor, " M"] | None,
    cross_entropy: CrossEntropy = cross_entropy,
) -> Float[Tensor, ""]:
    """Return the sum of the weighted losses; `cross_entropy` decides what a row's loss is."""
    recorded = torch.is_grad_enabled()
    return _SummedLoss.apply(*widened(hidden, weight), labels, weights, cross_entropy, recorded)


def loss_per_token(
    hidden: Float[Tensor, "M D"],
    weight: Float[Tensor, "V D"],
    labels: Int[Tensor, " M"],
    cross_entropy: CrossEntropy = cross_entropy,
) -> Float[Tensor, " M"]:
    """Return the loss of each row, 0 without a label; `cross_entropy` decides what it is."""
    if labels.device.type != "cpu":  # the host would wait for a GPU to find the labels
        return _LossPerToken.apply(hidden, weight, labels, cross_entropy)
    hidden, weight = widened(hidden, weight)
    kept = (labels != IGNORED).nonzero().squeeze(1)
    if kept.shape[0] == labels.shape[0]:
        return _LossPerToken.apply(hidden, weight, labels, cross_entropy)
    losses = _LossPerToken.apply(hidden[kept], weight, labels[kept], cross_entropy)
    return losses.new_zeros(labels.shape).index_copy(0, kept, losses)


def chunked(
    hidden: Float[Tensor, "M D"],
    weight: Float[Tensor, "V D"],
    labels: Int[Tensor, " M"],
    reduction: Literal["sum", "none"],
    weights: Float[Tensor, " M"] | None = None,
) -> Tensor:
    """The reference's loss, chunk by chunk."""
    if reduction == "sum":
        return summed_loss(hidden, weight, labels, weights)
    losses = loss_per_token(hidden, weight, labels)
    return losses if weights is None else losses * weights


linear_cross_entropy = LinearCrossEntropyOp(
    "linear_cross_entropy",
    [
        triton_backend(
            "nemotron.ops.linear_cross_entropy.triton",
            "linear_cross_entropy",
        ),
        numba_backend("nemotron.ops.linear_cross_entropy.numba", "linear_cross_entropy"),
        Backend("chunked", chunked),
        Backend("reference", reference),
    ],
)
