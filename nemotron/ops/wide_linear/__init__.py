"""Matrix product in float32 of activations that may be narrower: the router's."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nemotron.ops.registry import Backend, Operation
from nemotron.ops.wide_linear import split


class WideLinearOp(Operation):
    """Return x weightᵀ in float32, or in float64 where the weight is; neither is rounded."""

    def __call__(
        self, x: Float[Tensor, "M K"], weight: Float[Tensor, "N K"]
    ) -> Float[Tensor, "M N"]:
        return self.select(x, float64=weight.dtype == torch.float64)(x, weight)


def reference(x: Float[Tensor, "M K"], weight: Float[Tensor, "N K"]) -> Float[Tensor, "M N"]:
    """The product in float32 or wider, as torch takes and differentiates it."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return F.linear(x.to(dtype), weight.to(dtype))


wide_linear = WideLinearOp(
    "wide_linear", [split.backend, Backend("reference", reference, features=frozenset({"float64"}))]
)
