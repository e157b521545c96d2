"""The scales of a model: of its weights, its inputs and its cache, shared where engines fuse."""

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from nemotron.errors import UserError
from nemotron.precision.formats import E4M3
from nemotron.precision.nvfp4 import GLOBAL_MAX
from nemotron.precision.scales import LinearScales, StoredFormat
from nemotron.precision.static import ModelScales
from nemotron.precision.stored import invertible_scale
from nemotron.quantize.calibrate import Observed
from nemotron.quantize.observers import positive, weight_scales
from nemotron.quantize.presets import WeightObserver


@torch.no_grad()
def model_scales(
    model: nn.Module,
    table: Mapping[str, StoredFormat],
    observed: Observed,
    observer: WeightObserver = "max",
    *,
    cache: bool = False,
) -> ModelScales:
    """Return the fixed scales of a model whose layers have these formats.

    Raises:
        UserError: when a layer saw nothing.
    """
    shared = _shared_magnitudes(model, table)
    linears: dict[str, LinearScales] = {}
    for name, format in table.items():
        for matrix, weight in model.get_submodule(name).named_parameters(recurse=False):
            key = name if matrix == "weight" else f"{name}.{matrix}"
            input_scale = _input_scale(key, format, observed)
            for place, part in _parts(key, weight):
                own = weight_scales(part, format, observer, shared.get(name))
                linears[place] = replace(own, input_scale=input_scale)
    caches = _cache_scales(observed) if cache else {}
    return ModelScales(linears, caches)


def fused_group(name: str) -> str:
    """Return the name of what engines fuse a layer into: q, k and v of a layer are one."""
    return re.sub(r"\.[qkv]_proj$", ".qkv_proj", name)


def _shared_magnitudes(model: nn.Module, table: Mapping[str, StoredFormat]) -> dict[str, Tensor]:
    """Return the largest magnitude of fused weights, for each of the layers that are fused."""
    groups: dict[str, Tensor] = {}
    for name in table:
        if (group := fused_group(name)) != name:
            weight = model.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            amax = weight.abs().amax().float()
            groups[group] = torch.maximum(groups[group], amax) if group in groups else amax
    return {name: groups[fused_group(name)] for name in table if fused_group(name) in groups}


def _parts(key: str, weight: Tensor) -> list[tuple[str, Tensor]]:
    """Return the matrices of a parameter, by their names in Hugging Face's layout."""
    if weight.dim() == 2:
        return [(key, weight)]
    layer, _, matrix = key.rpartition(".")
    return [(f"{layer}.{expert}.{matrix}", part) for expert, part in enumerate(weight)]


def _input_scale(key: str, format: StoredFormat, observed: Observed) -> Tensor:
    amax = observed.amax(key, format)
    if amax is None or not torch.isfinite(amax):
        raise UserError(
            "saw no finite input during calibration; calibrate on more text, or check the model.",
            key=key,
        )
    if format == "nvfp4":
        return invertible_scale(positive(amax / GLOBAL_MAX))
    return positive(amax / E4M3.max)


def _cache_scales(observed: Observed) -> dict[str, Tensor]:
    """Return the scales of keys and values: the largest / 448."""
    return {
        f"{name}.{'k' if name.endswith('k_proj') else 'v'}_scale": positive(amax / E4M3.max)
        for name, amax in observed.cache.items()
    }
