"""Matrix product with a master weight that is wider than the activations."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nemotron.ops.linear import float32_gradient
from nemotron.ops.registry import Backend, Operation


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


linear = LinearOp(
    "linear",
    [float32_gradient.backend, Backend("reference", reference, features=frozenset({"same_dtype"}))],
)
