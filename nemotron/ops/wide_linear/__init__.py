"""Matrix product in float32 of activations that may be narrower: the router's."""

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.ops.registry import Operation
from nemotron.ops.wide_linear import reference, split


class WideLinearOp(Operation):
    """Return x weightᵀ in float32, or in float64 where the weight is; neither is rounded."""

    def __call__(
        self, x: Float[Tensor, "M K"], weight: Float[Tensor, "N K"]
    ) -> Float[Tensor, "M N"]:
        return self.select(x, float64=weight.dtype == torch.float64)(x, weight)


wide_linear = WideLinearOp("wide_linear", [split.backend, reference.backend])
