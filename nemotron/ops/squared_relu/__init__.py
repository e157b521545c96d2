"""The activation of feed-forward layers and experts."""

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.ops.registry import Backend, Operation, lazy
from nemotron.ops.squared_relu import blocked


class SquaredReLUOp(Operation):
    """Return relu(x)² in the dtype of `x`; of a matrix, times a float32 `weight` for each row.

    The weighted square is taken in float32 and rounded once, as Megatron-LM's fused kernel does.
    Source: So et al. 2021, "Primer"; for the weight, NVIDIA/Megatron-LM:
    megatron/core/fusions/fused_weighted_squared_relu.py.
    """

    def __call__(
        self, x: Float[Tensor, "*batch F"], weight: Float[Tensor, "*batch 1"] | None = None
    ) -> Float[Tensor, "*batch F"]:
        return self.select(x)(x, weight)


def reference(
    x: Float[Tensor, "*batch F"], weight: Float[Tensor, "*batch 1"] | None
) -> Float[Tensor, "*batch F"]:
    """relu(x)², times the weight of the row if there is one, in float32 or wider."""
    square = x.to(torch.promote_types(x.dtype, torch.float32)).relu().square()
    return (square if weight is None else square * weight).to(x.dtype)


squared_relu = SquaredReLUOp(
    "squared_relu",
    [
        Backend(
            "triton",
            lazy("nemotron.ops.squared_relu.triton", "squared_relu"),
            devices=frozenset({"cuda"}),
            dtypes=frozenset({torch.float32, torch.bfloat16}),
            packages=("triton",),
            install="comes with torch for CUDA",
            imports=("nemotron.ops.squared_relu.triton",),
        ),
        blocked.backend,
        Backend("reference", reference),
    ],
)
