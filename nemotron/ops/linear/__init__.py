"""Matrix product with a master weight that is wider than the activations."""

from jaxtyping import Float
from torch import Tensor

from nemotron.ops.linear import float32_gradient, reference
from nemotron.ops.registry import Operation

operation = Operation("linear", [float32_gradient.backend, reference.backend])


def linear(x: Float[Tensor, "*batch K"], weight: Float[Tensor, "N K"]) -> Float[Tensor, "*batch N"]:
    """Return x weightᵀ in the dtype of `x`, to which the weight is rounded first."""
    return operation.select(x, same_dtype=weight.dtype == x.dtype)(x, weight)
