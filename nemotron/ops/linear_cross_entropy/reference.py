"""Head and cross entropy with all logits at once: the definition, not for training."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.registry import Backend


def linear_cross_entropy(
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


backend = Backend("reference", linear_cross_entropy)
