"""Gate and grouped norm by Triton kernels; backward keeps the inputs and one number a group."""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron.ops.launch import power_of_2
from nemotron.ops.rms_norm.triton import as_rows, multiprocessors, rows_of_a_block, share
from nemotron.ops.tuning.tunable import Tunable


@triton.jit(do_not_specialize=["rows"])
def _forward(
    y_ptr,
    z_ptr,
    weight_ptr,
    result_ptr,
    scale_ptr,
    rows,
    y_stride,
    z_stride,
    eps,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0) % GROUPS
    first = (tl.program_id(0) // GROUPS).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    channel = group * SIZE + column
    inside = (first + row < rows)[:, None] & (column < SIZE)[None, :]
    at = y_ptr + first * y_stride + (row[:, None] * y_stride + channel[None, :])
    y = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at = z_ptr + first * z_stride + (row[:, None] * z_stride + channel[None, :])
    z = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + channel, mask=column < SIZE, other=0.0).to(tl.float32)
    gated = y * (z * tl.sigmoid(z))
    scale = tl.rsqrt(tl.sum(gated * gated, 1) / SIZE + eps)
    tl.store(scale_ptr + (first + row) * GROUPS + group, scale, mask=first + row < rows)
    result = gated * scale[:, None] * weight[None, :]
    width = GROUPS * SIZE
    at = result_ptr + first * width + (row[:, None] * width + channel[None, :])
    tl.store(at, result.to(result_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "steps"])
def _backward(
    y_ptr,
    z_ptr,
    weight_ptr,
    scale_ptr,
    grad_ptr,
    grad_y_ptr,
    grad_z_ptr,
    grad_weight_ptr,
    rows,
    steps,
    y_stride,
    z_stride,
    grad_stride,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
):
    group = tl.program_id(0) % GROUPS
    program = tl.program_id(0) // GROUPS
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    channel = group * SIZE + column
    width = GROUPS * SIZE
    weight = tl.load(weight_ptr + channel, mask=column < SIZE, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        first = (program * steps + step).to(tl.int64) * ROWS
        inside = (first + row < rows)[:, None] & (column < SIZE)[None, :]
        at = y_ptr + first * y_stride + (row[:, None] * y_stride + channel[None, :])
        y = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        at = z_ptr + first * z_stride + (row[:, None] * z_stride + channel[None, :])
        z = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        at = grad_ptr + first * grad_stride + (row[:, None] * grad_stride + channel[None, :])
        grad = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        at = scale_ptr + (first + row) * GROUPS + group
        scale = tl.load(at, mask=first + row < rows, other=0.0)
        sigmoid = tl.sigmoid(z)
        silu = z * sigmoid
        unit = y * silu * scale[:, None]
        if WEIGHT_GRAD:
            grad_weight += unit * grad
        inner = grad * weight[None, :]
        shared = tl.sum(unit * inner, 1) / SIZE
        grad_gated = (inner - unit * shared[:, None]) * scale[:, None]
        # d silu / dz = sigmoid + silu (1 - sigmoid)
        grad_z = grad_gated * y * (sigmoid + silu * (1 - sigmoid))
        at = row[:, None] * width + channel[None, :]
        grad_y = (grad_gated * silu).to(grad_y_ptr.dtype.element_ty)
        tl.store(grad_y_ptr + first * width + at, grad_y, mask=inside)
        grad_z = grad_z.to(grad_z_ptr.dtype.element_ty)
        tl.store(grad_z_ptr + first * width + at, grad_z, mask=inside)
    if WEIGHT_GRAD:
        at = grad_weight_ptr + program * width + channel
        tl.store(at, tl.sum(grad_weight, 0), mask=column < SIZE)


FORWARD = Tunable(
    "gated_rms_norm",
    "forward",
    (_forward,),
    ("rows", "group"),
    # two 8 KiB tiles of bfloat16 a program, 64 bytes of each a thread
    {"elements": 4096, "warps": 4},
    {"elements": (1024, 2048, 4096, 8192), "warps": (2, 4, 8, 16)},
    reorders=("elements", "warps"),
)
BACKWARD = Tunable(
    "gated_rms_norm",
    "backward",
    (_backward,),
    ("rows", "group"),
    # three tiles are read, and the sum for the gain stays in registers beside them; stages are rows
    # on their way while others are worked on; as many programs as have room for their registers
    {"elements": 2048, "warps": 4, "stages": 3, "programs": 3},
    {
        "elements": (1024, 2048, 4096, 8192),
        "warps": (2, 4, 8, 16),
        "stages": (1, 2, 3, 4),
        "programs": (2, 3, 4, 6, 8),
    },
    reorders=("elements", "warps", "stages", "programs"),
)


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
        ys, zs = as_rows(y), as_rows(z)
        rows, width = ys.shape
        size = width // groups
        result = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        scale = torch.empty(rows, groups, dtype=torch.float32, device=y.device)
        block = power_of_2(size)
        launch = FORWARD.at(y, rows, size)
        height = rows_of_a_block(launch["elements"], block)
        _forward[(triton.cdiv(rows, height) * groups,)](
            ys,
            zs,
            weight,
            result,
            scale,
            rows,
            ys.stride(0),
            zs.stride(0),
            eps,
            SIZE=size,
            GROUPS=groups,
            ROWS=height,
            BLOCK=block,
            num_warps=launch["warps"],
        )
        ctx.save_for_backward(y, z, weight, scale)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight, scale = ctx.saved_tensors
        ys, zs, grad = as_rows(y), as_rows(z), as_rows(grad)
        (rows, width), groups = ys.shape, scale.shape[1]
        size = width // groups
        block = power_of_2(size)
        launch = BACKWARD.at(y, rows, size)
        height = rows_of_a_block(launch["elements"], block)
        most = launch["programs"] * multiprocessors(y.device)
        programs, steps = share(rows, height, max(1, most // groups))
        grad_y, grad_z = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (y, z))
        needs_weight = ctx.needs_input_grad[2]
        partial = torch.empty(
            programs if needs_weight else 0, width, dtype=torch.float32, device=y.device
        )
        _backward[(programs * groups,)](
            ys,
            zs,
            weight,
            scale,
            grad,
            grad_y,
            grad_z,
            partial,
            rows,
            steps,
            ys.stride(0),
            zs.stride(0),
            grad.stride(0),
            SIZE=size,
            GROUPS=groups,
            ROWS=height,
            BLOCK=block,
            STAGES=launch["stages"],
            WEIGHT_GRAD=needs_weight,
            num_warps=launch["warps"],
        )
        grad_weight = partial.sum(0).to(weight.dtype) if needs_weight else None
        return grad_y, grad_z, grad_weight, None, None


def gated_rms_norm(
    y: Float[Tensor, "*batch D"],
    z: Float[Tensor, "*batch D"],
    weight: Float[Tensor, " D"],
    groups: int,
    eps: float,
) -> Float[Tensor, "*batch D"]:
    """The reference's formula in float32, rounded once, with a hand-written gradient."""
    return _GatedRMSNorm.apply(y, z, weight, groups, eps)
