"""Products of rows by kernels for CPUs: in bfloat16 too, and as fast for small matrices."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron.ops.jit import matrices
from nemotron.ops.jit.call import kernels, run, workspace
from nemotron.ops.jit.matrices import ROWS, TALL, WIDE
from nemotron.ops.jit.vectors import LANES

fill_up, strips_of = matrices.fill_up.py_func, matrices.strips_of.py_func


class Form(NamedTuple):
    """Kernels, by how matrices lie while they are multiplied, and the room that they take."""

    module: str
    forward: Callable[["Sizes"], dict[str, Any]]
    backward: Callable[["Sizes", "Blocks"], dict[str, Any]]


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: tuple[int, ...], form: Form) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        y = x.new_empty(x.shape[0], weight.shape[1])
        ctx.save_for_backward(x, weight)
        ctx.found, ctx.form = kernels(form.module, x.dtype), form
        ctx.blocks = Blocks.of(counts)
        values = _inputs(x, weight, ctx.blocks) | form.forward(Sizes.of(weight)) | {"y": y}
        run(ctx.found.forward, ctx.found.CALL, x.dtype, values)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), found = ctx.saved_tensors, ctx.found
        values: dict[str, Any] = {"dy": dy.contiguous()}
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            values["dx"] = dx = torch.empty_like(x)
        if ctx.needs_input_grad[1]:
            values["dweight"] = dweight = torch.empty(weight.shape)
        room = ctx.form.backward(Sizes.of(weight), ctx.blocks)
        run(found.backward, found.CALL, x.dtype, _inputs(x, weight, ctx.blocks) | room | values)
        return dx, None if dweight is None else dweight.to(weight.dtype), None, None


def _inputs(x: Tensor, weight: Tensor, blocks: "Blocks") -> dict[str, Any]:
    groups, outer, inner = weight.shape
    sizes = {"groups": groups, "outer": outer, "inner": inner, "wide": weight.dtype != x.dtype}
    return sizes | blocks.inputs() | {"x": x, "weight": weight}


class Blocks(NamedTuple):
    """The blocks of rows of all groups, as kernels take them."""

    table: Int[Tensor, "blocks 4"]
    bounds: Int[Tensor, " groups+1"]
    """The first block of each group, and the number of blocks."""
    rows: int
    """Rows, filled up in each block."""

    @classmethod
    @functools.lru_cache(64)
    def of(cls, counts: tuple[int, ...]) -> "Blocks":
        """Return the blocks of groups with so many rows each."""
        blocks, bounds, first, filled = [], [0], 0, 0
        for group, count in enumerate(counts):
            for row in range(0, count, ROWS):
                rows = min(ROWS, count - row)
                blocks.append((group, first + row, rows, filled))
                filled += fill_up(rows)
            first += count
            bounds.append(len(blocks))
        return cls(torch.tensor(blocks, dtype=torch.int64), torch.tensor(bounds), filled)

    def inputs(self) -> dict[str, Any]:
        """Return what every kernel takes of them, with new counters of units."""
        counters = torch.zeros(3, dtype=torch.int64)
        values = {"table": self.table, "bounds": self.bounds, "next": counters}
        return {"blocks": len(self.table), **values}


class Sizes(NamedTuple):
    """Numbers that strips hold: matrices, a row on either side, and a block of a result."""

    groups: int
    outer: int
    inner: int
    result: int

    @classmethod
    def of(cls, weight: Float[Tensor, "groups outer inner"]) -> "Sizes":
        """Return those for a stack of matrices."""
        outer, inner = (strips_of(size) * LANES for size in weight.shape[1:])
        return cls(weight.shape[0], outer, inner, WIDE * LANES * max(ROWS, TALL * LANES))

    @property
    def matrices(self) -> int:
        """Numbers of all matrices."""
        return self.groups * self.outer * self.inner


def _forward(sizes: Sizes) -> dict[str, Any]:
    return workspace(sizes.inner * ROWS + sizes.result, packed=sizes.matrices)


def _backward(sizes: Sizes, blocks: Blocks) -> dict[str, Any]:
    rows = {"slopes": blocks.rows * sizes.outer, "rows": blocks.rows * sizes.inner}
    return workspace(sizes.result, packed=sizes.matrices, **rows)


FLOAT32 = Form("nemotron.ops.grouped_linear.kernels", _forward, _backward)
"""All numbers in float32."""


def readable(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight as kernels read it: in float32, or in the dtype of the rows."""
    return weight if weight.dtype == torch.float32 else weight.to(dtype)


def grouped_linear(
    x: Float[Tensor, "R K"],
    weight: Float[Tensor, "E N K"],
    counts: Int[Tensor, " E"],
    form: Form = FLOAT32,
) -> Float[Tensor, "R N"]:
    """The reference's products, each result rounded once."""
    return _GroupedLinear.apply(x, readable(weight, x.dtype), tuple(counts.tolist()), form)


def linear(
    x: Float[Tensor, "*batch K"], weight: Float[Tensor, "N K"], form: Form = FLOAT32
) -> Float[Tensor, "*batch N"]:
    """The same with one matrix for all rows."""
    rows = x.reshape(-1, x.shape[-1])
    matrix = readable(weight, x.dtype).unsqueeze(0)
    y = _GroupedLinear.apply(rows, matrix, (len(rows),), form)
    return y.view(*x.shape[:-1], weight.shape[0])
