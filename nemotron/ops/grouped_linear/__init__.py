"""Matrix products of the routed experts: rows sorted by expert, one matrix each."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.device import cpu_multiplies_bfloat16
from nemotron.ops import float32_products
from nemotron.ops.registry import Backend, Operation, int16_backend, numba_backend, triton_backend
from nemotron.ops.rounded import round_weight


class GroupedLinearOp(Operation):
    """Multiply the first counts[0] rows by weight[0]ᵀ, the next counts[1] by weight[1]ᵀ, …

    The weights are rounded to the dtype of `x` first. The counts add up to R: no row is dropped,
    and an expert without rows is fine.
    """

    def __call__(
        self, x: Float[Tensor, "R K"], weight: Float[Tensor, "E N K"], counts: Int[Tensor, " E"]
    ) -> Float[Tensor, "R N"]:
        return self.select(x, sizes=tuple(weight.shape[1:]))(x, weight, counts)


def reference(
    x: Float[Tensor, "R K"], weight: Float[Tensor, "E N K"], counts: Int[Tensor, " E"]
) -> Float[Tensor, "R N"]:
    """Multiply the rows of each group by the group's matrix."""
    parts, weight = x.split(counts.tolist()), weight.to(x.dtype)
    return torch.cat([part @ matrix.T for part, matrix in zip(parts, weight, strict=True)])


Product = Callable[[Tensor, Tensor, Tensor], object]
"""Writes the product of two matrices into a third."""


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.mm(a, b, out=out)


def _multiply_in_float32(a: Tensor, b: Tensor, out: Tensor) -> None:
    # a weight is float32 and gets rounded; its gradient is float32 and does not
    a, b = (t.to(torch.bfloat16).float() for t in (a, b))
    if out.dtype == torch.float32:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor, multiply: Product) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.multiply = multiply
        ctx.groups = groups_of(counts)
        y = x.new_empty(x.shape[0], weight.shape[1])
        for expert, rows in ctx.groups:
            multiply(x[rows], weight[expert].T, y[rows])
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x)
            for expert, rows in ctx.groups:
                ctx.multiply(grad[rows], weight[expert], grad_x[rows])
        if ctx.needs_input_grad[1]:
            used = len(ctx.groups) == weight.shape[0]
            grad_weight = torch.empty_like(weight) if used else torch.zeros_like(weight)
            for expert, rows in ctx.groups:
                ctx.multiply(grad[rows].T, x[rows], grad_weight[expert])
        return grad_x, grad_weight, None, None


def groups_of(counts: Tensor) -> list[tuple[int, slice]]:
    """Return each expert that has rows, with its rows; waits for the device of the counts."""
    groups, start = [], 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            groups.append((expert, slice(start, start + count)))
        start += count
    return groups


def loop(
    x: Float[Tensor, "R K"], weight: Float[Tensor, "E N K"], counts: Int[Tensor, " E"]
) -> Float[Tensor, "R N"]:
    """One product per expert that has rows, written into one output; on CPUs the fastest."""
    return _GroupedLinear.apply(x, weight.to(x.dtype), counts, _multiply)


def loop_in_float32(
    x: Float[Tensor, "R K"], weight: Float[Tensor, "E N K"], counts: Int[Tensor, " E"]
) -> Float[Tensor, "R N"]:
    """The same for bfloat16 on CPUs that do not multiply it; a gradient of weights is float32."""
    return _GroupedLinear.apply(x, weight, counts, _multiply_in_float32)


def grouped_mm(
    x: Float[Tensor, "R K"], weight: Float[Tensor, "E N K"], counts: Int[Tensor, " E"]
) -> Float[Tensor, "R N"]:
    """All products in one kernel of torch's, on Hopper and newer.

    Widths must be multiples of 8 (16 bytes in bf16).
    """
    ends = counts.cumsum(0, dtype=torch.int32)
    return F.grouped_mm(x, round_weight(weight, x.dtype).mT, offs=ends)


def _limit(*widths: int) -> str | None:
    if any(width % 8 for width in widths):
        return f"takes widths that 8 divides, not {' x '.join(map(str, widths))}"
    return None


grouped_linear = GroupedLinearOp(
    "grouped_linear",
    [
        Backend(
            "grouped_mm",
            grouped_mm,
            devices=frozenset({"cuda"}),
            dtypes=frozenset({torch.bfloat16}),
            limit=_limit,
        ),
        triton_backend(
            "nemotron.ops.grouped_linear.triton",
            "grouped_linear",
            dtypes=frozenset({torch.bfloat16}),
            by_name=True,  # has not run on a GPU yet
        ),
        numba_backend("nemotron.ops.grouped_linear.numba", "grouped_linear"),
        int16_backend("nemotron.ops.grouped_linear.int16", "grouped_linear"),
        float32_products.backend(loop_in_float32),
        Backend("loop", loop),
        Backend("reference", reference),
    ],
)


def row_multiple(x: Tensor) -> int:
    """Return to which multiple the rows of a group are best padded, for tensors like `x`.

    oneDNN compiles a bf16 product for every distinct shape; few shapes keep it from compiling
    in every step. The products are right for any counts.
    """
    compiles = x.dtype == torch.bfloat16 and x.device.type == "cpu"
    return 64 if compiles and cpu_multiplies_bfloat16() else 1
