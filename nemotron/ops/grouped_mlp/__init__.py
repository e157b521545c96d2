"""The routed experts as one operation: both products with the activation between them."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.grouped_linear import grouped_linear
from nemotron.ops.registry import Backend, Operation, int16_backend, numba_backend, triton_backend
from nemotron.ops.squared_relu import squared_relu


class GroupedMLPOp(Operation):
    """Pass each expert's rows through it: down(w relu(up(x))²), with the weight w of the row.

    Weighted squares are taken in float32 and rounded once, as is each product. Rows and counts are
    those of `GroupedLinearOp`. For layers that would else call the three operations themselves.
    """

    def __call__(
        self,
        x: Float[Tensor, "R I"],
        weights: Float[Tensor, "R 1"],
        up: Float[Tensor, "E F I"],
        down: Float[Tensor, "E I F"],
        counts: Int[Tensor, " E"],
    ) -> Float[Tensor, "R I"]:
        return self.select(x)(x, weights, up, down, counts)


def one_by_one(
    x: Float[Tensor, "R I"],
    weights: Float[Tensor, "R 1"],
    up: Float[Tensor, "E F I"],
    down: Float[Tensor, "E I F"],
    counts: Int[Tensor, " E"],
) -> Float[Tensor, "R I"]:
    """The three operations, each by its first choice: what layers do without this one."""
    return grouped_linear(squared_relu(grouped_linear(x, up, counts), weights), down, counts)


grouped_mlp = GroupedMLPOp(
    "grouped_mlp",
    [
        triton_backend(
            "nemotron.ops.grouped_linear.triton",
            "grouped_mlp",
            dtypes=frozenset({torch.bfloat16}),
            by_name=True,  # has not run on a GPU yet
        ),
        numba_backend("nemotron.ops.grouped_mlp.numba", "grouped_mlp"),
        int16_backend("nemotron.ops.grouped_mlp.int16", "grouped_mlp"),
        Backend("reference", one_by_one),
    ],
)
