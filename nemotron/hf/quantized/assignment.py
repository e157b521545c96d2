"""What quantization decided about a model: a format and scales for layers, and a layout."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemotron.errors import UserError
from nemotron.hf.formats import DiskFormat, Formats
from nemotron.hf.names import DiskParameter
from nemotron.hf.quantized.layouts import FORMAT_NAMES, LAYOUTS, LayoutName
from nemotron.hf.quantized.linear import QuantizedLinear, WithConstants, layer_of, specs_of
from nemotron.precision.formats import E4M3
from nemotron.precision.nvfp4 import BLOCK
from nemotron.precision.scales import LinearScales, StoredFormat

NEVER = (".gate", ".conv1d", "backbone.embeddings")
"""Ends of the names of layers that no engine quantizes."""
CACHE_SCALES = {".k_proj": "k_scale", ".v_proj": "v_scale"}
FUSED = (".q_proj", ".k_proj", ".v_proj")
"""Layers that engines multiply as one."""


@dataclass(frozen=True)
class Quantized:
    """The quantized layers of a model, and the layout that they are written in."""

    layers: Mapping[str, LinearScales]
    """By the name of the layer on disk, such as `backbone.layers.3.mixer.experts.0.up_proj`."""
    cache_scales: Mapping[str, Tensor] = field(default_factory=dict)
    """float32 scalars of an FP8 cache of keys and values, such as
    `backbone.layers.7.mixer.k_proj.k_scale`: largest magnitude / 448."""
    layout: LayoutName = "modelopt"

    @property
    def formats(self) -> dict[str, StoredFormat]:
        """The format of each layer."""
        return {name: scales.format for name, scales in self.layers.items()}

    def named_formats(self, parameters: Sequence[DiskParameter]) -> dict[str, DiskFormat]:
        """Return the formats of the parameters that are quantized, or have scales of the cache.

        Raises:
            UserError: when engines could not read the layers so, or a scale does not fit.
        """
        found = {layer_of(p.name): p for p in parameters if is_linear(p)}
        cache = {name.rpartition(".")[0]: name for name in self.cache_scales}
        for name in (*self.layers, *cache):
            if name not in found:
                raise UserError("is not a linear layer of the model.", key=name)
        check_fused(self.layers)
        return {
            found[name].name: self._format(found[name], cache.get(name))
            for name in dict.fromkeys((*self.layers, *cache))
        }

    def _format(self, parameter: DiskParameter, cache: str | None) -> DiskFormat:
        layer, form = layer_of(parameter.name), parameter.format
        if layer in self.layers:
            scales = self.layers[layer]
            _check_scales(parameter, scales)
            constants = LAYOUTS[self.layout].constants(scales)
            layout = LAYOUTS[self.layout]
            form = QuantizedLinear(layout, scales.format, specs_of(constants), constants)
        if cache is None:
            return form
        scale = self.cache_scales[cache]
        key = cache.rpartition(".")[2]
        if key != next((k for end, k in CACHE_SCALES.items() if layer.endswith(end)), None):
            raise UserError("is not a scale of keys or values.", key=cache)
        _check_scalar(cache, scale)
        constants = {key: scale.to(torch.float32).reshape(LAYOUTS[self.layout].scalar).clone()}
        return WithConstants(form, specs_of(constants), constants)


def quantized_formats(
    formats: Formats, quantized: Quantized, parameters: Sequence[DiskParameter]
) -> Formats:
    """Return the formats of an export whose layers are quantized; `parameters` have the others.

    Raises:
        UserError: as `Quantized.named_formats`.
    """
    named = {**formats.named, **quantized.named_formats(parameters)}
    return Formats(formats.rules, formats.default, named)


def is_linear(parameter: DiskParameter) -> bool:
    """Say whether a parameter is the weight of a layer that may be quantized."""
    name = parameter.name
    if not name.endswith(".weight") or len(parameter.shape) != 2:
        return False
    return not layer_of(name).endswith(NEVER)


def check_fused(layers: Mapping[str, LinearScales]) -> None:
    """Check that layers which engines multiply as one agree.

    Source: vllm-project/vllm: layers/quantization/modelopt.py: `_resolve_quant_algo` (one format),
    `process_weights_after_loading` (one scale of the tensor).

    Raises:
        UserError: when they do not.
    """
    attention: dict[str, list[str]] = defaultdict(list)
    experts: dict[str, tuple[str, StoredFormat]] = {}
    for name, scales in layers.items():
        mixer, _, _ = name.partition(".experts.")
        if mixer != name:
            first, format = experts.setdefault(mixer, (name, scales.format))
            if format != scales.format:
                rule = f"is {FORMAT_NAMES[scales.format]}, but {first} {FORMAT_NAMES[format]}; "
                raise UserError(rule + "the experts of a layer have one format.", key=name)
        elif name.endswith(FUSED):
            attention[name.rpartition(".")[0]].append(name)
    for mixer, own in attention.items():
        outer = {(layers[name].format, _outer(layers[name])) for name in own}
        if len(own) != len(FUSED) or len(outer) > 1:
            rule = "must have one format and one scale of the tensor: engines multiply them as one."
            raise UserError(rule, key=f"{mixer}: q_proj, k_proj and v_proj")


def _outer(scales: LinearScales) -> float:
    scale = scales.weight_scale if scales.weight_scale_2 is None else scales.weight_scale_2
    return float(scale)


def _check_scales(parameter: DiskParameter, scales: LinearScales) -> None:
    """Check shapes, dtypes and values of a layer's scales."""
    layer, (rows, columns) = layer_of(parameter.name), parameter.shape
    if scales.input_scale is not None:
        _check_scalar(f"{layer}.input_scale", scales.input_scale)
    if scales.format == "fp8":
        _check_scalar(f"{layer}.weight_scale", scales.weight_scale)
        return
    if columns % BLOCK:
        rule = f"cannot be NVFP4: its {columns} inputs are not a multiple of {BLOCK}; use fp8."
        raise UserError(rule, key=layer)
    if scales.weight_scale_2 is None:
        raise UserError("is absent; NVFP4 needs it.", key=f"{layer}.weight_scale_2")
    _check_scalar(f"{layer}.weight_scale_2", scales.weight_scale_2)
    blocks = scales.weight_scale
    if tuple(blocks.shape) != (rows, columns // BLOCK) or blocks.dtype != E4M3.dtype:
        rule = f"is {blocks.dtype} {list(blocks.shape)} instead of E4M3 {[rows, columns // BLOCK]}."
        raise UserError(rule, key=f"{layer}.weight_scale")
    if not bool((blocks.view(torch.uint8) < 0x7F).all()):
        raise UserError("holds NaN or negative numbers.", key=f"{layer}.weight_scale")


def _check_scalar(name: str, scale: Tensor) -> None:
    """Check that a scale is one positive number."""
    value = float(scale) if scale.numel() == 1 else float("nan")
    if not 0 < value < float("inf"):
        raise UserError(f"is {value} instead of one positive number.", key=name)
