"""Language-model head and cross entropy in one."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.linear_cross_entropy import chunked
from nemotron.ops.registry import Backend, Operation, lazy


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
    losses = F.cross_entropy(wide, labels, ignore_index=-100, reduction="none")
    if weights is not None:
        losses = losses * weights
    return losses.sum() if reduction == "sum" else losses


linear_cross_entropy = LinearCrossEntropyOp(
    "linear_cross_entropy",
    [
        Backend(
            "triton",
            lazy("nemotron.ops.linear_cross_entropy.triton", "linear_cross_entropy"),
            devices=frozenset({"cuda"}),
            dtypes=frozenset({torch.bfloat16, torch.float32}),
            packages=("triton",),
            install="comes with torch for CUDA",
            imports=("nemotron.ops.linear_cross_entropy.triton",),
        ),
        chunked.backend,
        Backend("reference", reference),
    ],
)
