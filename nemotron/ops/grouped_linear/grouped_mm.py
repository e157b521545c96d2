"""torch's grouped matrix product: one kernel for all experts, on Hopper and newer."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.registry import Backend


def grouped_linear(
    x: Float[Tensor, "R K"], weight: Float[Tensor, "E N K"], counts: Int[Tensor, " E"]
) -> Float[Tensor, "R N"]:
    """All products in one kernel; widths must be multiples of 8 (16 bytes in bf16)."""
    ends = counts.cumsum(0, dtype=torch.int32)
    return F.grouped_mm(x, weight.mT, offs=ends)


def _limit(*widths: int) -> str | None:
    if any(width % 8 for width in widths):
        return f"takes widths that 8 divides, not {' x '.join(map(str, widths))}"
    return None


backend = Backend(
    "grouped_mm",
    grouped_linear,
    devices=frozenset({"cuda"}),
    dtypes=frozenset({torch.bfloat16}),
    limit=_limit,
)
