"""Matrix products with a master weight that is wider than the activations."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nemotron.ops.linear import float32_gradient, float32_products, split
from nemotron.ops.registry import Backend, Operation, int16_backend, numba_backend

_SAME = frozenset({"same_dtype"})


class LinearOp(Operation):
    """Return x weightᵀ in the dtype of `x`, to which the weight is rounded first."""

    def __call__(
        self, x: Float[Tensor, "*batch K"], weight: Float[Tensor, "N K"]
    ) -> Float[Tensor, "*batch N"]:
        return self.select(x, same_dtype=weight.dtype == x.dtype)(x, weight)


def reference(
    x: Float[Tensor, "*batch K"], weight: Float[Tensor, "N K"]
) -> Float[Tensor, "*batch N"]:
    """Round the weight to the dtype of `x` and multiply."""
    return F.linear(x, weight.to(x.dtype))


class WideLinearOp(Operation):
    """Return x weightᵀ in float32, or in float64 where the weight is; neither is rounded."""

    def __call__(
        self, x: Float[Tensor, "M K"], weight: Float[Tensor, "N K"]
    ) -> Float[Tensor, "M N"]:
        return self.select(x, float64=weight.dtype == torch.float64)(x, weight)


def wide_reference(x: Float[Tensor, "M K"], weight: Float[Tensor, "N K"]) -> Float[Tensor, "M N"]:
    """The product in float32 or wider, as torch takes and differentiates it."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return F.linear(x.to(dtype), weight.to(dtype))


linear = LinearOp(
    "linear",
    [
        float32_gradient.backend,
        numba_backend("nemotron.ops.grouped_linear.numba", "linear", features=_SAME),
        int16_backend("nemotron.ops.grouped_linear.int16", "linear", features=_SAME),
        float32_products.backend,
        Backend("reference", reference, features=_SAME),
    ],
)

wide_linear = WideLinearOp(
    "wide_linear",
    [split.backend, Backend("reference", wide_reference, features=frozenset({"float64"}))],
)
