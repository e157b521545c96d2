"""Causal depthwise convolution with SiLU."""

from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.causal_conv1d import package, reference, taps
from nemotron.ops.registry import Operation

operation = Operation("causal_conv1d", [package.backend, taps.backend, reference.backend])


def causal_conv1d(
    x: Float[Tensor, "B T C"],
    weight: Float[Tensor, "C W"],
    bias: Float[Tensor, " C"] | None,
    *,
    initial_state: Float[Tensor, "B W1 C"] | None = None,
    seq_idx: Int[Tensor, "B T"] | None = None,
    activation: bool = True,
) -> Float[Tensor, "B T C"]:
    """Convolve each channel with its own W taps over the past, then apply SiLU.

    `initial_state` holds the W-1 inputs before `x` (zeros when absent) and belongs to document 0;
    with `seq_idx`, inputs of another document count as zero. Result in the dtype of `x`.
    """
    function = operation.select(
        x,
        documents=seq_idx is not None,
        initial_state=initial_state is not None,
        documents_after_a_state=seq_idx is not None and initial_state is not None,
        any_width=x.shape[2] % 8 != 0,
    )
    return function(x, weight, bias, initial_state, seq_idx, activation)
