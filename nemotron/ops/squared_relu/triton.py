"""Squared ReLU by Triton kernels, one pass each way; backward keeps only the inputs."""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron.ops.launch import power_of_2
from nemotron.ops.rms_norm.triton import as_rows, rows_of_a_block

# 8 KiB of bfloat16 are read a program: ten of them and more have room on a multiprocessor
FORWARD_ELEMENTS = 4096
BACKWARD_ELEMENTS = 2048
WARPS = 4
# the widths of experts, 1,856 and 2,688, leave 10 and 13 % of such blocks empty
COLUMNS = 1024


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x_ptr,
    weight_ptr,
    y_ptr,
    rows,
    x_stride,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    blocks: tl.constexpr = (F + COLUMNS - 1) // COLUMNS
    first = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = (first + row < rows)[:, None] & (column < F)[None, :]
    at = x_ptr + first * x_stride + (row[:, None] * x_stride + column[None, :])
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    # written so that NaN stays NaN, as torch's relu has it
    positive = tl.where(x < 0, 0.0, x)
    y = positive * positive
    if WEIGHTED:
        weight = tl.load(weight_ptr + first + row, mask=first + row < rows, other=0.0)
        y *= weight.to(tl.float32)[:, None]
    at = y_ptr + first * F + (row[:, None] * F + column[None, :])
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    x_ptr,
    weight_ptr,
    grad_ptr,
    grad_x_ptr,
    grad_weight_ptr,
    rows,
    x_stride,
    grad_stride,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    in_rows = first + row < rows
    twice = tl.full([ROWS], 2.0, tl.float32)
    if WEIGHTED:
        twice *= tl.load(weight_ptr + first + row, mask=in_rows, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, F, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = in_rows[:, None] & (column < F)[None, :]
        at = x_ptr + first * x_stride + (row[:, None] * x_stride + column[None, :])
        x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        at = grad_ptr + first * grad_stride + (row[:, None] * grad_stride + column[None, :])
        grad = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        positive = tl.where(x < 0, 0.0, x)
        product = positive * grad
        if WEIGHTED:
            total += positive * product
        at = grad_x_ptr + first * F + (row[:, None] * F + column[None, :])
        grad_x = product * twice[:, None]
        tl.store(at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    if WEIGHTED:
        at = grad_weight_ptr + first + row
        tl.store(at, tl.sum(total, 1).to(grad_weight_ptr.dtype.element_ty), mask=in_rows)


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        matrix = as_rows(x)
        rows, width = matrix.shape
        columns = min(COLUMNS, power_of_2(width))
        height = rows_of_a_block(FORWARD_ELEMENTS, columns)
        result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _forward[(triton.cdiv(rows, height) * triton.cdiv(width, columns),)](
            matrix,
            matrix if weight is None else weight.contiguous(),
            result,
            rows,
            matrix.stride(0),
            F=width,
            ROWS=height,
            COLUMNS=columns,
            WEIGHTED=weight is not None,
            num_warps=WARPS,
        )
        ctx.save_for_backward(x, weight)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        matrix, grad = as_rows(x), as_rows(grad)
        rows, width = matrix.shape
        columns = min(COLUMNS, power_of_2(width))
        height = rows_of_a_block(BACKWARD_ELEMENTS, columns)
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grad_weight = None
        if weight is not None:
            grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
        _backward[(triton.cdiv(rows, height),)](
            matrix,
            matrix if weight is None else weight.contiguous(),
            grad,
            grad_x,
            grad_x if grad_weight is None else grad_weight,
            rows,
            matrix.stride(0),
            grad.stride(0),
            F=width,
            ROWS=height,
            COLUMNS=columns,
            WEIGHTED=weight is not None,
            num_warps=WARPS,
        )
        return grad_x, grad_weight


def squared_relu(
    x: Float[Tensor, "*batch F"], weight: Float[Tensor, "*batch 1"] | None
) -> Float[Tensor, "*batch F"]:
    """The reference's formula in float32, rounded once, with a hand-written gradient."""
    return _SquaredReLU.apply(x, weight)
