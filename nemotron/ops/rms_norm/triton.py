"""Normalization by Triton kernels; backward is one pass and keeps one number a row."""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron.ops.launch import power_of_2
from nemotron.ops.tuning.tunable import Tunable

# more rows of a narrow matrix would leave multiprocessors without a program
MOST_ROWS = 16


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x_ptr,
    weight_ptr,
    y_ptr,
    scale_ptr,
    rows,
    x_stride,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (first + row < rows)[:, None] & (column < D)[None, :]
    at = x_ptr + first * x_stride + (row[:, None] * x_stride + column[None, :])
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    tl.store(scale_ptr + first + row, scale, mask=first + row < rows)
    y = x * scale[:, None] * weight[None, :]
    at = y_ptr + first * D + (row[:, None] * D + column[None, :])
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "steps"])
def _backward(
    x_ptr,
    weight_ptr,
    scale_ptr,
    grad_ptr,
    beside_ptr,
    grad_x_ptr,
    grad_weight_ptr,
    rows,
    steps,
    x_stride,
    grad_stride,
    beside_stride,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    BESIDE: tl.constexpr,
):
    program = tl.program_id(0)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        first = (program * steps + step).to(tl.int64) * ROWS
        inside = (first + row < rows)[:, None] & (column < D)[None, :]
        at = x_ptr + first * x_stride + (row[:, None] * x_stride + column[None, :])
        x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        at = grad_ptr + first * grad_stride + (row[:, None] * grad_stride + column[None, :])
        grad = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + first + row, mask=first + row < rows, other=0.0)
        unit = x * scale[:, None]
        if WEIGHT_GRAD:
            grad_weight += unit * grad
        inner = grad * weight[None, :]
        shared = tl.sum(unit * inner, 1) / D
        grad_x = (inner - unit * shared[:, None]) * scale[:, None]
        if BESIDE:
            at = first * beside_stride + (row[:, None] * beside_stride + column[None, :])
            grad_x += tl.load(beside_ptr + at, mask=inside, other=0.0).to(tl.float32)
        at = grad_x_ptr + first * D + (row[:, None] * D + column[None, :])
        tl.store(at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    if WEIGHT_GRAD:
        at = grad_weight_ptr + program * D + column
        tl.store(at, tl.sum(grad_weight, 0), mask=column < D)


FORWARD = Tunable(
    "rms_norm",
    "forward",
    (_forward,),
    ("rows", "width"),
    # 16 KiB of bfloat16 a program, 64 bytes a thread: four such programs keep the memory busy
    {"elements": 8192, "warps": 8},
    {"elements": (2048, 4096, 8192, 16384), "warps": (2, 4, 8, 16)},
    reorders=("elements", "warps"),
)
BACKWARD = Tunable(
    "rms_norm",
    "backward",
    (_backward,),
    ("rows", "width"),
    # half as many elements, because the rows of two tensors and the gain's sum are held at once;
    # stages are rows on their way while one is worked on; more programs a multiprocessor would
    # write more partial sums than two rows in flight are worth
    {"elements": 4096, "warps": 8, "stages": 3, "programs": 2},
    {
        "elements": (2048, 4096, 8192, 16384),
        "warps": (2, 4, 8, 16),
        "stages": (1, 2, 3, 4),
        "programs": (1, 2, 3, 4, 6, 8),
    },
    reorders=("elements", "warps", "stages", "programs"),
)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        result, scale = _normalize(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        return *_gradients(x, weight, scale, grad, None, ctx.needs_input_grad[1]), None


class _ResidualRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        result, scale = _normalize(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return x.view_as(x), result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, beside: Tensor, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        return *_gradients(x, weight, scale, grad, beside, ctx.needs_input_grad[1]), None


def _normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm and by what each row was multiplied for it."""
    matrix = as_rows(x)
    rows, width = matrix.shape
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = power_of_2(width)
    launch = FORWARD.at(x, rows, width)
    height = rows_of_a_block(launch["elements"], block)
    _forward[(triton.cdiv(rows, height),)](
        matrix,
        weight,
        result,
        scale,
        rows,
        matrix.stride(0),
        eps,
        D=width,
        ROWS=height,
        BLOCK=block,
        num_warps=launch["warps"],
    )
    return result, scale


def _gradients(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    grad: Tensor,
    beside: Tensor | None,
    needs_weight: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return those of `x`, to which `beside` is added, and of the weight."""
    matrix, grad = as_rows(x), as_rows(grad)
    other = grad if beside is None else as_rows(beside)
    rows, width = matrix.shape
    block = power_of_2(width)
    launch = BACKWARD.at(x, rows, width)
    height = rows_of_a_block(launch["elements"], block)
    most = launch["programs"] * multiprocessors(x.device)
    programs, steps = share(rows, height, most)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = torch.empty(
        programs if needs_weight else 0, width, dtype=torch.float32, device=x.device
    )
    _backward[(programs,)](
        matrix,
        weight,
        scale,
        grad,
        other,
        grad_x,
        partial,
        rows,
        steps,
        matrix.stride(0),
        grad.stride(0),
        other.stride(0),
        D=width,
        ROWS=height,
        BLOCK=block,
        STAGES=launch["stages"],
        WEIGHT_GRAD=needs_weight,
        BESIDE=beside is not None,
        num_warps=launch["warps"],
    )
    return grad_x, partial.sum(0).to(weight.dtype) if needs_weight else None


def as_rows(x: Float[Tensor, "*batch D"]) -> Float[Tensor, "M D"]:
    """Return a matrix whose rows may lie apart, but each in one piece; a copy only where needed."""
    matrix = x.reshape(-1, x.shape[-1])
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def rows_of_a_block(elements: int, width: int) -> int:
    """Return how many rows, a power of 2, make a block of about that many elements."""
    return max(1, min(MOST_ROWS, elements // width))


def share(rows: int, height: int, most: int) -> tuple[int, int]:
    """Return how many programs, at most `most`, share the blocks of rows, and the share of each."""
    blocks = max(1, triton.cdiv(rows, height))
    steps = triton.cdiv(blocks, most)
    return triton.cdiv(blocks, steps), steps


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has; for anything else, few."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 2


def rms_norm(
    x: Float[Tensor, "*batch D"], weight: Float[Tensor, " D"], eps: float
) -> Float[Tensor, "*batch D"]:
    """The reference's formula in float32, rounded once, with a hand-written gradient."""
    return _RMSNorm.apply(x, weight, eps)


def residual_rms_norm(
    x: Float[Tensor, "*batch D"], weight: Float[Tensor, " D"], eps: float
) -> tuple[Float[Tensor, "*batch D"], Float[Tensor, "*batch D"]]:
    """Return `x` and its norm; backward adds the gradients of both in the norm's own pass."""
    return _ResidualRMSNorm.apply(x, weight, eps)
