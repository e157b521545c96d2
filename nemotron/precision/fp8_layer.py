"""Linear layers in FP8 on Hopper: operands quantised by kernels, without a wait for the device.

Products of a single matrix are cuBLAS's, those of experts are a kernel's: torch's grouped product
takes neither E5M2 nor the scales of blocks. Codes and scales are those of `schemes.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType

from nemotron.precision.config import NVFP4Config
from nemotron.precision.delayed import DelayedFP8Scheme
from nemotron.precision.formats import E4M3
from nemotron.precision.kernels import grouped_fp8
from nemotron.precision.kernels import quantize_fp8 as kernels
from nemotron.precision.kernels.quantize_fp8 import TILE, Codes, Plan, Sides
from nemotron.precision.random_bits import Draw
from nemotron.precision.saving import put_back, take_out
from nemotron.precision.schemes import PER_TENSOR, BlockFP8Scheme, Scheme

STEP = 16
"""What cuBLAS wants the sizes of matrices with one scale to be multiples of."""
FAST_FORWARD = True
"""Whether outputs of tensors with one scale are summed by the tensor cores alone, as Transformer
Engine does it: with about 14 bits, which is more than codes have. Gradients never are."""


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
        return _Linear.apply(x, weight.unsqueeze(0), None, scheme, torch.is_grad_enabled())

    def grouped(
        self,
        x: Float[Tensor, "R K"],
        weight: Float[Tensor, "E N K"],
        counts: Int[Tensor, " E"],
        name: str,
        draw: Draw | None,
    ) -> Float[Tensor, "R N"]:
        """Multiply each expert's rows by its matrix; rows that no expert has become 0."""
        return _Linear.apply(x, weight, counts, self.schemes[name], torch.is_grad_enabled())


def build(schemes: Mapping[str, Scheme], format: str, options: NVFP4Config) -> FP8Layer:
    """Return the layer of matrices with these schemes."""
    return FP8Layer(schemes)


class _Like(NamedTuple):
    """What a result is like, which cuBLAS makes itself and a kernel writes into."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


class _Linear(torch.autograd.Function):
    """Y = X Wᵀ; of X and W only the codes that backward reads are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "R K"],
        weight: Float[Tensor, "G N K"],
        counts: Int[Tensor, " G"] | None,
        scheme: Scheme,
        is_training: bool,
    ) -> Float[Tensor, "R N"]:
        ctx.shape, ctx.weight_dtype, ctx.scheme = weight.shape, weight.dtype, scheme
        ctx.kept = ()
        saved: list[Tensor] = []
        like = _Like((x.shape[0], weight.shape[1]), x.dtype, x.device)
        if not x.shape[0]:
            return like.empty()
        plan = None if counts is None else kernels.plan(counts, x.shape[0])
        activation = quantize(
            scheme, "x", x, plan,
            turned=is_training and ctx.needs_input_grad[1], remembers=is_training,
        )  # fmt: skip
        matrix = quantize(
            scheme, "w", weight, plan, turned=is_training and ctx.needs_input_grad[0],
            remembers=is_training,
        )  # fmt: skip
        assert activation.row is not None
        assert matrix.row is not None
        y = multiply(scheme, activation.row, matrix.row, plan, like, fast=FAST_FORWARD)
        if is_training:
            kept = (activation.turned, matrix.turned, plan)
            ctx.kept = tuple(part and take_out(part, saved) for part in kept)
            ctx.save_for_backward(*saved)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        like_x = _Like((dy.shape[0], ctx.shape[2]), dy.dtype, dy.device)
        like_weight = _Like(ctx.shape, ctx.weight_dtype, dy.device)
        dx = dw = None
        if not dy.shape[0]:
            dx = like_x.empty() if wants_x else None
            dw = like_weight.empty().zero_() if wants_weight else None
            return dx, dw, None, None, None
        saved = ctx.saved_tensors
        activation, matrix, plan = (part and put_back(part, saved) for part in ctx.kept)
        gradient = quantize(ctx.scheme, "dy", dy, plan, row=wants_x, turned=wants_weight)
        if wants_x:
            assert gradient.row is not None
            dx = multiply(ctx.scheme, gradient.row, matrix, plan, like_x, fast=False)
        if wants_weight:
            assert gradient.turned is not None
            dw = multiply_turned(ctx.scheme, gradient.turned, activation, plan, like_weight)
        return dx, dw, None, None, None


def quantize(
    scheme: Scheme,
    operand: str,
    tensor: Float[Tensor, "*G N K"],
    plan: Plan | None,
    *,
    row: bool = True,
    turned: bool = True,
    remembers: bool = True,
) -> Sides:
    """Quantise an operand of a layer; delayed scaling may remember its magnitudes."""
    rows = None if operand == "w" else plan
    run = partial(kernels.quantize, tensor, plan=rows, row=row, turned=turned)
    if isinstance(scheme, BlockFP8Scheme):
        return run(E4M3, kernels.BY_SQUARES if operand == "w" else kernels.BY_ROWS)
    run = partial(run, PER_TENSOR[operand], multiple=STEP if plan is None else TILE)
    if isinstance(scheme, DelayedFP8Scheme):
        slot = scheme.slots[operand]
        newest = slot.newest if remembers else None
        return run(kernels.BY_SCALE, given=slot.scale, newest=newest)
    amax = kernels.largest(tensor, rows)
    if (reduce := scheme.reduce.get(operand)) is not None:
        amax = reduce(amax)
    return run(kernels.BY_AMAX, given=amax)


def multiply(
    scheme: Scheme, rows: Codes, matrices: Codes, plan: Plan | None, like: _Like, *, fast: bool
) -> Float[Tensor, "R N"]:
    """Return rows times matrices, transposed."""
    in_blocks = isinstance(scheme, BlockFP8Scheme)
    # blocks fill a matrix up to whole ones, and a copy would take out what is too much
    if plan is not None or (in_blocks and like.shape[1] % TILE):
        out = like.empty()
        grouped_fp8.multiply(rows, matrices, plan, out, in_blocks=in_blocks, fast=fast)
        return out
    right = Codes(matrices.elements[0], matrices.scale_inv)
    kinds = (ScalingType.TensorWise, ScalingType.TensorWise)
    if in_blocks:
        kinds = (ScalingType.BlockWise1x128, ScalingType.BlockWise128x128)
    return _scaled_mm(rows, right, kinds, like, fast=fast and not in_blocks)


def multiply_turned(
    scheme: Scheme, left: Codes, right: Codes, plan: Plan | None, like: _Like
) -> Float[Tensor, "G N K"]:
    """Return the sums over each tensor's rows of outer products."""
    in_blocks = isinstance(scheme, BlockFP8Scheme)
    if plan is not None:
        out = like.empty()
        grouped_fp8.multiply_turned(left, right, plan, out, in_blocks=in_blocks)
        return out
    kinds = (ScalingType.TensorWise, ScalingType.TensorWise)
    if in_blocks:
        kinds = (ScalingType.BlockWise1x128, ScalingType.BlockWise1x128)
    return _scaled_mm(left, right, kinds, like, fast=False).unsqueeze(0)


def _scaled_mm(
    left: Codes, right: Codes, kinds: tuple[ScalingType, ScalingType], like: _Like, *, fast: bool
) -> Float[Tensor, "M N"]:
    """Return cuBLAS's product without what fills its sides up."""
    sides = zip((left, right), kinds, strict=True)
    scales = [_as_cublas(side.scale_inv, kind) for side, kind in sides]
    swizzles = [SwizzleType.NO_SWIZZLE] if kinds[0] != ScalingType.TensorWise else []
    result = F.scaled_mm(
        left.elements,
        right.elements.T,
        [scales[0]],
        [kinds[0]],
        [scales[1]],
        [kinds[1]],
        swizzle_a=swizzles,
        swizzle_b=swizzles,
        output_dtype=like.dtype,
        use_fast_accum=fast,
    )
    rows, columns = like.shape[-2:]
    return result[:rows, :columns].contiguous()


def _as_cublas(scale_inv: Tensor, kind: ScalingType) -> Tensor:
    if kind == ScalingType.TensorWise:
        return scale_inv.view(())
    if kind == ScalingType.BlockWise128x128:
        return scale_inv[0].T
    return scale_inv.T
