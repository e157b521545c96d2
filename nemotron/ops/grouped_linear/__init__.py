"""Matrix products of the routed experts: rows sorted by expert, one matrix each."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.grouped_linear import grouped_mm, loop
from nemotron.ops.registry import Backend, Operation


class GroupedLinearOp(Operation):
    """Multiply the first counts[0] rows by weight[0]ᵀ, the next counts[1] by weight[1]ᵀ, …

    The counts add up to R: no row is dropped, and an expert without rows is fine.
    """

    def __call__(
        self, x: Float[Tensor, "R K"], weight: Float[Tensor, "E N K"], counts: Int[Tensor, " E"]
    ) -> Float[Tensor, "R N"]:
        return self.select(x, sizes=tuple(weight.shape[1:]))(x, weight, counts)


def reference(
    x: Float[Tensor, "R K"], weight: Float[Tensor, "E N K"], counts: Int[Tensor, " E"]
) -> Float[Tensor, "R N"]:
    """Multiply the rows of each group by the group's matrix."""
    parts = x.split(counts.tolist())
    return torch.cat([part @ matrix.T for part, matrix in zip(parts, weight, strict=True)])


grouped_linear = GroupedLinearOp(
    "grouped_linear", [grouped_mm.backend, loop.backend, Backend("reference", reference)]
)


def row_multiple(x: Tensor) -> int:
    """Return to which multiple the rows of a group are best padded, for tensors like `x`.

    oneDNN compiles a bf16 product for every distinct shape; few shapes keep it from compiling
    in every step. The products are right for any counts.
    """
    return 64 if x.dtype == torch.bfloat16 and x.device.type == "cpu" else 1
