"""One matrix product per group of rows."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.registry import Backend


def grouped_linear(
    x: Float[Tensor, "R K"], weight: Float[Tensor, "E N K"], counts: Int[Tensor, " E"]
) -> Float[Tensor, "R N"]:
    """Multiply the rows of each group by the group's matrix."""
    parts = x.split(counts.tolist())
    return torch.cat([part @ matrix.T for part, matrix in zip(parts, weight, strict=True)])


backend = Backend("reference", grouped_linear)
