"""Products of rows by kernels for CPUs: in bfloat16 too, and as fast for small matrices."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron.ops.jit.call import kernels, run, workspace

MODULE = "nemotron.ops.grouped_linear.kernels"


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        found = kernels(MODULE, x.dtype)
        x, weight = x.contiguous(), weight.contiguous()
        y = x.new_empty(x.shape[0], weight.shape[1])
        values = _inputs(x, weight, counts)
        strips = found.strips_of(weight.shape[2]) + found.WIDE
        room = _workspace(found, weight, strips * found.ROWS * found.LANES)
        run(found.forward, found.CALL, x.dtype, values | room | {"y": y})
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        found, dx, dweight = kernels(MODULE, x.dtype), None, None
        values = _inputs(x, weight, ctx.counts) | {"dy": dy.contiguous()}
        if ctx.needs_input_grad[0]:
            values["dx"] = dx = torch.empty_like(x)
        if ctx.needs_input_grad[1]:
            values["dweight"] = dweight = torch.empty(weight.shape)
        width = found.LANES * values["filled"]
        outer, inner = (found.strips_of(size) for size in weight.shape[1:])
        numbers = found.WIDE * max(found.ROWS, found.TALL * found.LANES) * found.LANES
        room = _workspace(found, weight, numbers, slopes=outer * width, rows=inner * width)
        run(found.backward, found.CALL, x.dtype, values | room)
        return dx, None if dweight is None else dweight.to(weight.dtype), None


def _workspace(found: Any, weight: Tensor, scratch: int, **numbers: int) -> dict[str, Any]:
    """Return room for the matrices, for each thread, and for what else is named."""
    outer, inner = (found.strips_of(size) * found.LANES for size in weight.shape[1:])
    numbers["packed"] = weight.shape[0] * outer * inner
    threads = torch.get_num_threads()
    return workspace(scratch=scratch * threads, **numbers) | {"scratch_size": scratch * 4}


def _inputs(x: Tensor, weight: Tensor, counts: list[int]) -> dict[str, Any]:
    found = kernels(MODULE, x.dtype)
    blocks, bounds, first, filled = [], [0], 0, 0
    for group, count in enumerate(counts):
        for row in range(0, count, found.ROWS):
            rows = min(found.ROWS, count - row)
            blocks.append((group, first + row, rows, filled))
            filled += found.fill_up(rows)
        first += count
        bounds.append(len(blocks))
    groups, outer, inner = weight.shape
    return {
        "inner": inner,
        "outer": outer,
        "groups": groups,
        "blocks": len(blocks),
        "filled": filled,
        "table": torch.tensor(blocks, dtype=torch.int64),
        "bounds": torch.tensor(bounds),
        "wide": weight.dtype != x.dtype,
        "x": x,
        "weight": weight,
        "next": torch.zeros(2, dtype=torch.int64),
    }


def grouped_linear(
    x: Float[Tensor, "R K"], weight: Float[Tensor, "E N K"], counts: Int[Tensor, " E"]
) -> Float[Tensor, "R N"]:
    """The reference's products in float32, each result rounded once."""
    return _GroupedLinear.apply(x, weight, counts.tolist())


def linear(x: Float[Tensor, "*batch K"], weight: Float[Tensor, "N K"]) -> Float[Tensor, "*batch N"]:
    """The same with one matrix for all rows."""
    rows = x.reshape(-1, x.shape[-1])
    y = _GroupedLinear.apply(rows, weight.unsqueeze(0), [rows.shape[0]])
    return y.view(*x.shape[:-1], -1)
