"""Causal depthwise convolution with SiLU."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.causal_conv1d import blocked, package, reference
from nemotron.ops.registry import Backend, Operation, lazy


class CausalConv1dOp(Operation):
    """Convolve each channel with its own kernel of width W over the past, then apply SiLU.

    `initial_state` holds the W-1 inputs before `x` (zeros when absent) and belongs to document 0;
    with `seq_idx`, inputs of another document count as zero. Result in the dtype of `x`.
    """

    def __call__(
        self,
        x: Float[Tensor, "B T C"],
        weight: Float[Tensor, "C W"],
        bias: Float[Tensor, " C"] | None,
        *,
        initial_state: Float[Tensor, "B W1 C"] | None = None,
        seq_idx: Int[Tensor, "B T"] | None = None,
        activation: bool = True,
    ) -> Float[Tensor, "B T C"]:
        function = self.select(
            x,
            documents=seq_idx is not None,
            initial_state=initial_state is not None,
            documents_after_a_state=seq_idx is not None and initial_state is not None,
            # x may be a slice of a wider tensor
            any_width=any(number % 8 for number in (x.shape[2], *x.stride()[:2])),
        )
        return function(x, weight, bias, initial_state, seq_idx, activation)


causal_conv1d = CausalConv1dOp(
    "causal_conv1d",
    [
        Backend(
            "triton",
            lazy("nemotron.ops.causal_conv1d.triton", "causal_conv1d"),
            devices=frozenset({"cuda"}),
            dtypes=frozenset({torch.float32, torch.bfloat16}),
            features=frozenset(
                {"documents", "initial_state", "documents_after_a_state", "any_width"}
            ),
            packages=("triton",),
            install="comes with torch for CUDA",
            imports=("nemotron.ops.causal_conv1d.triton",),
        ),
        package.backend,
        blocked.backend,
        reference.backend,
    ],
)
