"""Linear layers in FP8 on Hopper: operands quantized by kernels, without a wait for the device.

Products of a single matrix are cuBLAS's, those of experts are a kernel's: torch's grouped product
takes neither E5M2 nor the scales of blocks. Codes and scales are those of `schemes.py`. Where the
kernels' codes of float32 would be wrong (`quantize_fp8.has_kernels`), layers are emulated.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType

from nemotron.ops.grouped_linear import tiles
from nemotron.ops.grouped_linear.tiles import TILE, Plan
from nemotron.precision.config import NVFP4Config
from nemotron.precision.delayed import DelayedFP8Scheme
from nemotron.precision.formats import E4M3
from nemotron.precision.kernels import grouped_fp8
from nemotron.precision.kernels import quantize_fp8 as kernels
from nemotron.precision.kernels.quantize_fp8 import Codes, Sides
from nemotron.precision.linear import quantized_grouped_linear, quantized_linear
from nemotron.precision.random_bits import Draw
from nemotron.precision.schemes import PER_TENSOR, BlockFP8Scheme, Scheme

STEP = 16
"""What cuBLAS wants the sizes of matrices with one scale to be multiples of."""
FAST_FORWARD = True
"""Whether outputs of tensors with one scale are summed by the tensor cores alone, as Transformer
Engine does it: with about 14 bits, which is more than codes have. Gradients never are."""

_TENSORS, _ROWS, _SQUARES = (
    [kind]
    for kind in (ScalingType.TensorWise, ScalingType.BlockWise1x128, ScalingType.BlockWise128x128)
)
_PLAIN = [SwizzleType.NO_SWIZZLE]


@dataclass(frozen=True)
class FP8Layer:
    """What replaces the call of a module whose format is an FP8."""

    schemes: Mapping[str, Scheme]
    """Of each matrix by its name in the module."""

    def linear(
        self, x: Float[Tensor, "M K"], weight: Float[Tensor, "N K"], draw: Draw | None
    ) -> Float[Tensor, "M N"]:
        """Return X Wᵀ; gradients round to nearest, whatever is drawn."""
        scheme = self.schemes["weight"]
        if not _has_kernels(scheme, x):
            return quantized_linear(x, weight, scheme)
        return _Linear.apply(x, weight, None, scheme, torch.is_grad_enabled())

    def grouped(
        self,
        x: Float[Tensor, "R K"],
        weight: Float[Tensor, "E N K"],
        counts: Int[Tensor, " E"],
        name: str,
        draw: Draw | None,
    ) -> Float[Tensor, "R N"]:
        """Multiply each expert's rows by its matrix; rows that no expert has become 0."""
        scheme = self.schemes[name]
        if not _has_kernels(scheme, x):
            used = int(counts.sum())
            y = quantized_grouped_linear(x[:used], weight, counts, scheme)
            return F.pad(y, (0, 0, 0, x.shape[0] - used))
        return _Linear.apply(x, weight, counts, scheme, torch.is_grad_enabled())


def build(schemes: Mapping[str, Scheme], format: str, options: NVFP4Config) -> FP8Layer:
    """Return the layer of matrices with these schemes."""
    return FP8Layer(schemes)


def _has_kernels(scheme: Scheme, x: Tensor) -> bool:
    return kernels.has_kernels(x.dtype, in_blocks=isinstance(scheme, BlockFP8Scheme))


class _Linear(torch.autograd.Function):
    """Y = X Wᵀ; of X and W only the codes that backward reads are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "R K"],
        weight: Float[Tensor, "*G N K"],
        counts: Int[Tensor, " G"] | None,
        scheme: Scheme,
        is_training: bool,
    ) -> Float[Tensor, "R N"]:
        rows, columns = x.shape[0], weight.shape[-2]
        ctx.shape, ctx.weight_dtype, ctx.scheme = weight.shape, weight.dtype, scheme
        ctx.groups = None
        if not rows:
            return x.new_empty(0, columns)
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        plan = None if counts is None else tiles.plan(counts, rows)
        activation, activation_columnwise = quantize(
            scheme, "x", x, plan, columnwise=is_training and wants_weight, remembers=is_training
        )
        matrix, matrix_columnwise = quantize(
            scheme, "w", weight, plan, columnwise=is_training and wants_x, remembers=is_training
        )
        assert activation is not None
        assert matrix is not None
        y = multiply(scheme, activation, matrix, plan, (rows, columns), x.dtype, fast=FAST_FORWARD)
        if is_training:
            bounds = None
            if plan is not None:
                bounds, ctx.groups, _ = plan
            kept = (*(activation_columnwise or (None, None)), *(matrix_columnwise or (None, None)))
            ctx.save_for_backward(*kept, bounds)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        rows, columns = dy.shape[0], ctx.shape[-1]
        dx = dw = None
        if not rows:
            dx = dy.new_empty(0, columns) if wants_x else None
            dw = dy.new_zeros(ctx.shape, dtype=ctx.weight_dtype) if wants_weight else None
            return dx, dw, None, None, None
        x_codes, x_scale_inv, w_codes, w_scale_inv, bounds = ctx.saved_tensors
        plan = None if bounds is None else Plan(bounds, ctx.groups, rows)
        gradient, columnwise = quantize(
            ctx.scheme, "dy", dy, plan, row=wants_x, columnwise=wants_weight
        )
        if gradient is not None:
            matrix = Codes(w_codes, w_scale_inv)
            dx = multiply(ctx.scheme, gradient, matrix, plan, (rows, columns), dy.dtype, fast=False)
        if columnwise is not None:
            activation = Codes(x_codes, x_scale_inv)
            dw = multiply_columnwise(
                ctx.scheme, columnwise, activation, plan, ctx.shape, ctx.weight_dtype
            )
        return dx, dw, None, None, None


def quantize(
    scheme: Scheme,
    operand: str,
    tensor: Float[Tensor, "*G N K"],
    plan: Plan | None,
    *,
    row: bool = True,
    columnwise: bool = True,
    remembers: bool = True,
) -> Sides:
    """Quantize an operand of a layer; delayed scaling may remember its magnitudes."""
    multiple = STEP if plan is None else TILE
    is_weight = operand == "w"
    if is_weight:
        plan = None
    if isinstance(scheme, BlockFP8Scheme):
        scaling = kernels.BY_SQUARES if is_weight else kernels.BY_ROWS
        return kernels.quantize(
            tensor, E4M3, scaling, plan=plan, row=row, columnwise=columnwise, narrow=is_weight
        )
    if is_weight:  # a pass of its own: see `kernels.has_kernels`
        tensor = tensor.to(torch.bfloat16)
    newest = None
    if isinstance(scheme, DelayedFP8Scheme):
        slot = scheme.slots[operand]
        scaling, given = kernels.BY_SCALE, slot.scale
        newest = slot.newest if remembers else None
    elif (reduce := scheme.reduce.get(operand)) is not None:
        scaling, given = kernels.BY_AMAX, reduce(kernels.largest(tensor, plan))
    else:
        scaling, given = kernels.BY_PARTS, kernels.measure(tensor, plan)
    return kernels.quantize(
        tensor, PER_TENSOR[operand], scaling, given=given, plan=plan, multiple=multiple,
        row=row, columnwise=columnwise, newest=newest,
    )  # fmt: skip


def multiply(
    scheme: Scheme,
    rows: Codes,
    matrices: Codes,
    plan: Plan | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    fast: bool,
) -> Float[Tensor, "R N"]:
    """Return rows times matrices, transposed, without what fills them up."""
    in_blocks = isinstance(scheme, BlockFP8Scheme)
    # blocks fill a matrix up to whole ones, and a copy would take out what is too much
    if plan is not None or (in_blocks and shape[1] % TILE):
        out = torch.empty(shape, dtype=dtype, device=rows.elements.device)
        grouped_fp8.multiply(rows, matrices, plan, out, in_blocks=in_blocks, fast=fast)
        return out
    if not in_blocks:
        return _scaled_mm(rows, matrices, _TENSORS, _TENSORS, shape, dtype, fast=fast)
    left = Codes(rows.elements, rows.scale_inv.T)
    right = Codes(matrices.elements, matrices.scale_inv[0].T)
    return _scaled_mm(left, right, _ROWS, _SQUARES, shape, dtype)


def multiply_columnwise(
    scheme: Scheme,
    left: Codes,
    right: Codes,
    plan: Plan | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Float[Tensor, "*G N K"]:
    """Return the sums over each tensor's rows of outer products."""
    in_blocks = isinstance(scheme, BlockFP8Scheme)
    if plan is not None:
        out = torch.empty(shape, dtype=dtype, device=left.elements.device)
        grouped_fp8.multiply_columnwise(left, right, plan, out, in_blocks=in_blocks)
        return out
    if not in_blocks:
        return _scaled_mm(left, right, _TENSORS, _TENSORS, shape, dtype)
    left, right = Codes(left.elements, left.scale_inv.T), Codes(right.elements, right.scale_inv.T)
    return _scaled_mm(left, right, _ROWS, _ROWS, shape, dtype)


def _scaled_mm(
    left: Codes,
    right: Codes,
    left_kind: list[ScalingType],
    right_kind: list[ScalingType],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    fast: bool = False,
) -> Float[Tensor, "M N"]:
    """Return cuBLAS's product without what fills its sides up."""
    swizzles = [] if left_kind is _TENSORS else _PLAIN
    result = F.scaled_mm(
        left.elements,
        right.elements.T,
        [left.scale_inv],
        left_kind,
        [right.scale_inv],
        right_kind,
        swizzle_a=swizzles,
        swizzle_b=swizzles,
        output_dtype=dtype,
        use_fast_accum=fast,
    )
    if result.shape == shape:
        return result
    rows, columns = shape
    return result[:rows, :columns].contiguous()
