"""Matrix product with a master weight that is wider than the activations."""

from jaxtyping import Float
from torch import Tensor

from nemotron.ops.linear import float32_gradient, reference
from nemotron.ops.registry import Operation


class LinearOp(Operation):
    """Return x weightᵀ in the dtype of `x`, to which the weight is rounded first."""

    def __call__(
        self, x: Float[Tensor, "*batch K"], weight: Float[Tensor, "N K"]
    ) -> Float[Tensor, "*batch N"]:
        return self.select(x, same_dtype=weight.dtype == x.dtype)(x, weight)


linear = LinearOp("linear", [float32_gradient.backend, reference.backend])
