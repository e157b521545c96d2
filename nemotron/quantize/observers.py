"""The scales of a weight: from its largest magnitudes, or those of the smallest error.

Source: modelopt/torch/quantization/qtensor/nvfp4_tensor.py of NVIDIA/Model-Optimizer.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.precision.blocks import block_amax
from nemotron.precision.formats import E2M1_MAX, E4M3, decode_fp8, round_e2m1, to_fp8
from nemotron.precision.nvfp4 import BLOCK
from nemotron.precision.scales import LinearScales, StoredFormat
from nemotron.precision.stored import invertible_scale
from nemotron.quantize.presets import WeightObserver

SMALLEST_SCALE = 2.0**-9
"""E4M3's smallest positive value; a block scale is never zero."""
FOUR_OVER_SIX_BOUND = 256.0
"""Largest block scale of a largest magnitude at 6, so that 1.5 times it fits below 448."""
MULTIPLIERS = (1.0, 1.5)
"""Of the block scale: the largest magnitude becomes 6, or 4."""


def weight_scales(
    weight: Float[Tensor, "N K"],
    format: StoredFormat,
    observer: WeightObserver = "max",
    amax: Float[Tensor, ""] | None = None,
) -> LinearScales:
    """Return the scales of a weight, without one for its input.

    `amax` is the largest magnitude where the scale of the tensor is shared with other layers.
    """
    wide = weight.detach().float()
    largest = wide.abs().amax() if amax is None else amax.float()
    if format == "fp8":
        return LinearScales("fp8", positive(largest / E4M3.max))
    bound = FOUR_OVER_SIX_BOUND if observer == "four_over_six" else E4M3.max
    outer = invertible_scale(positive(largest / (E2M1_MAX * bound)))
    candidates = _candidates(wide, outer, observer)
    return LinearScales("nvfp4", _best(wide, outer, candidates), outer)


def positive(scale: Tensor) -> Tensor:
    """Return a scale, or 1 where there is nothing to scale."""
    return torch.where(scale > 0, scale, 1.0)


def _candidates(weight: Tensor, outer: Tensor, observer: WeightObserver) -> list[Tensor]:
    """Return block scales in E4M3 of which each block may have any."""
    to_six = block_amax(weight, 1, BLOCK) / (E2M1_MAX * outer)
    to_six = torch.where(to_six == 0, 1.0, to_six)
    if observer == "mse":
        values = torch.arange(1, 0x7F, dtype=torch.uint8, device=weight.device).view(E4M3.dtype)
        return [value.expand(to_six.shape) for value in values]
    multipliers = MULTIPLIERS if observer == "four_over_six" else (1.0,)
    return [to_fp8((to_six * m).clamp(min=SMALLEST_SCALE), E4M3) for m in multipliers]


def _best(weight: Tensor, outer: Tensor, candidates: list[Tensor]) -> Tensor:
    """Return for each block the first of the scales with the smallest squared error."""
    blocks = weight.view(weight.shape[0], -1, BLOCK)
    best = candidates[0].contiguous()
    if len(candidates) == 1:
        return best
    smallest = torch.full(best.shape, torch.inf, device=weight.device)
    chosen = best.view(torch.uint8).clone()
    for scale in candidates:
        factors = (decode_fp8(scale.contiguous()) * outer).unsqueeze(-1)
        error = (round_e2m1(blocks / factors) * factors - blocks).square().sum(-1)
        is_better = error < smallest
        smallest = torch.where(is_better, error, smallest)
        chosen = torch.where(is_better, scale.contiguous().view(torch.uint8), chosen)
    return chosen.view(E4M3.dtype)
