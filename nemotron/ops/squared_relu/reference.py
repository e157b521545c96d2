"""Squared ReLU, as it is defined."""

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.ops.registry import Backend


def squared_relu(
    x: Float[Tensor, "*batch F"], weight: Float[Tensor, "*batch 1"] | None
) -> Float[Tensor, "*batch F"]:
    """relu(x)², times the weight of the row if there is one, in float32 or wider."""
    square = x.to(torch.promote_types(x.dtype, torch.float32)).relu().square()
    return (square if weight is None else square * weight).to(x.dtype)


backend = Backend("reference", squared_relu)
