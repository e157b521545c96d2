"""The numbers that quantized operands stand for, and their product."""

from torch import Tensor

from nemotron.precision.schemes import Quantized


def decoded(side: Quantized) -> Tensor:
    """Return [rows, contracted] in float64."""
    operand = side.operand()
    values = operand.side(0).double()
    return values if operand.scale is None else values * operand.scale.double()


def product(left: Quantized, right: Quantized) -> Tensor:
    """Return the product of the decoded operands in float64; one may have more padding."""
    a, b = decoded(left), decoded(right)
    inner = min(a.shape[1], b.shape[1])
    return a[:, :inner] @ b[:, :inner].T
