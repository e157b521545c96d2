"""Matrix product in float32 of activations that may be narrower: the router's."""

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.ops.registry import Operation
from nemotron.ops.wide_linear import reference, split

operation = Operation("wide_linear", [split.backend, reference.backend])


def wide_linear(x: Float[Tensor, "M K"], weight: Float[Tensor, "N K"]) -> Float[Tensor, "M N"]:
    """Return x weightᵀ in float32, or in float64 where the weight is; neither is rounded."""
    return operation.select(x, float64=weight.dtype == torch.float64)(x, weight)
