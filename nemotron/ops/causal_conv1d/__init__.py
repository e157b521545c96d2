"""Causal depthwise convolution with SiLU."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.causal_conv1d import blocked, cuda
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


def reference(
    x: Float[Tensor, "B T C"],
    weight: Float[Tensor, "C W"],
    bias: Float[Tensor, " C"] | None,
    initial_state: Float[Tensor, "B W1 C"] | None,
    seq_idx: Int[Tensor, "B T"] | None,
    activation: bool,
) -> Float[Tensor, "B T C"]:
    """Sum W products in float32 or wider; an input of another document counts as zero."""
    wide = torch.promote_types(x.dtype, torch.float32)
    width, length = weight.shape[1], x.shape[1]
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    inputs = torch.cat([initial_state, x], dim=1).to(wide)
    y = torch.zeros_like(x, dtype=wide)
    for offset in range(width):
        term = inputs[:, offset : offset + length] * weight[:, offset].to(wide)
        if seq_idx is not None:
            ids = F.pad(seq_idx, (width - 1, 0))  # what came before x belongs to document 0
            term = term * (ids[:, offset : offset + length] == seq_idx).unsqueeze(-1)
        y = y + term
    if bias is not None:
        y = y + bias.to(wide)
    return (F.silu(y) if activation else y).to(x.dtype)


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
        cuda.backend,
        Backend(
            "numba",
            lazy("nemotron.ops.causal_conv1d.numba", "causal_conv1d"),
            devices=frozenset({"cpu"}),
            dtypes=frozenset({torch.float32, torch.bfloat16}),
            features=frozenset(
                {"documents", "initial_state", "documents_after_a_state", "any_width"}
            ),
            packages=("numba",),
            install="pip install numba",
            imports=("nemotron.ops.jit.vectors",),
            by_name=True,
        ),
        blocked.backend,
        Backend(
            "reference",
            reference,
            features=frozenset(
                {"documents", "initial_state", "documents_after_a_state", "any_width"}
            ),
        ),
    ],
)
