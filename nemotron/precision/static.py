"""Give a built model the fixed scales of a quantized checkpoint: it computes as engines would.

A layer keeps its parameters and its name; only what its call does is replaced. Products are those
of the decoded operands in float32, rounded once to the dtype of the input.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nemotron.precision import nvfp4
from nemotron.precision.fixed_scales import (
    StraightThrough,
    round_fp8,
    round_input,
    round_weight,
    stack,
)
from nemotron.precision.groups import expert_chunks
from nemotron.precision.policy import kind_of
from nemotron.precision.scales import LinearScales

EXPERTS = "moe.experts"


@dataclass(frozen=True)
class ModelScales:
    """What quantization decided about a model."""

    linears: Mapping[str, LinearScales]
    """By the layer's name in Hugging Face's layout, where each expert has layers of its own."""
    cache: Mapping[str, Tensor] = field(default_factory=dict)
    """float32 scalars of keys and values, by names such as `layers.7.mixer.k_proj.k_scale`."""


@torch.no_grad()
def store_weights(model: nn.Module, scales: ModelScales) -> None:
    """Round the model's weights, in place, to the values that they have on disk."""
    for name, module in list(model.named_modules()):
        for matrix, weight in _weights(name, module):
            if (own := _scales_of(matrix, weight, scales)) is not None:
                weight.copy_(round_weight(weight, own))


def attach(model: nn.Module, scales: ModelScales, *, rounds_weights: bool = False) -> None:
    """Make the model's layers round their inputs, and keys and values, by fixed scales.

    With `rounds_weights` each call rounds the weights, too, and their gradients pass through to
    the unrounded ones; else they are taken to be those of `store_weights`.
    """
    for name, module in list(model.named_modules()):
        if is_scaled(name, module, scales):
            hook = "multiply" if kind_of(name) == EXPERTS else "forward"
            vars(module)[hook] = layer_call(name, module, scales, rounds_weights=rounds_weights)


def is_scaled(name: str, module: nn.Module, scales: ModelScales) -> bool:
    """Return whether there are scales for a layer of the model, or for what it adds to a cache."""
    return bool(_own(name, module, scales)) or _cache_name(name) in scales.cache


def layer_call(
    name: str, module: nn.Module, scales: ModelScales, *, rounds_weights: bool
) -> Callable[..., Tensor]:
    """Return what replaces the `forward` of a linear layer, or the `multiply` of experts."""
    own = _own(name, module, scales)
    if kind_of(name) == EXPERTS:
        return _grouped(name, module, own, rounds_weights=rounds_weights)
    linear = _linear(module, own[name], rounds_weights=rounds_weights) if own else None
    return _with_cache(module, linear, scales.cache.get(_cache_name(name)))


def _own(name: str, module: nn.Module, scales: ModelScales) -> dict[str, LinearScales]:
    return {
        matrix: found
        for matrix, weight in _weights(name, module)
        if (found := _scales_of(matrix, weight, scales)) is not None
    }


def detach(model: nn.Module) -> None:
    """Undo `attach`."""
    for name, module in model.named_modules():
        if kind_of(name) is not None:
            vars(module).pop("multiply" if kind_of(name) == EXPERTS else "forward", None)


def lacking(model: nn.Module, scales: ModelScales) -> str | None:
    """Return a layer that scales are for and that the model does not have so; None if all fit."""
    shapes: dict[str, torch.Size] = {}
    for name, module in model.named_modules():
        for matrix, weight in _weights(name, module):
            layer, _, projection = matrix.rpartition(".")
            each = [f"{layer}.{e}.{projection}" for e in range(weight.shape[0])]
            shapes |= dict.fromkeys([matrix] if weight.dim() == 2 else each, weight.shape[-2:])
    for name, own in scales.linears.items():
        blocks = own.weight_scale.shape
        shape = shapes.get(name)
        if shape is None or (
            own.format == "nvfp4" and blocks != (shape[0], shape[1] // nvfp4.BLOCK)
        ):
            return name
    return next((key for key in scales.cache if key.rpartition(".")[0] not in shapes), None)


def is_attached(module: nn.Module) -> bool:
    """Return whether a layer computes otherwise than its class says."""
    return "forward" in vars(module) or "multiply" in vars(module)


def _weights(name: str, module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the matrices of a linear layer; those of all experts are one, named without number."""
    kind = kind_of(name)
    if kind is None:
        return []
    if kind != EXPERTS:
        weight = module.weight
        assert isinstance(weight, Tensor)
        return [(name, weight)]
    return [(f"{name}.{key}", weight) for key, weight in module.named_parameters(recurse=False)]


def _scales_of(matrix: str, weight: Tensor, scales: ModelScales) -> LinearScales | None:
    if weight.dim() == 2:
        own = scales.linears.get(matrix)
        return None if own is None else _to(own, weight.device)
    layer, _, projection = matrix.rpartition(".")
    names = [f"{layer}.{expert}.{projection}" for expert in range(weight.shape[0])]
    if names[0] not in scales.linears:
        return None
    return _to(stack([scales.linears[name] for name in names]), weight.device)


def _to(scales: LinearScales, device: torch.device) -> LinearScales:
    second, given = scales.weight_scale_2, scales.input_scale
    return LinearScales(
        scales.format,
        scales.weight_scale.to(device),
        None if second is None else second.to(device),
        None if given is None else given.to(device),
    )


def _linear(
    module: nn.Module, scales: LinearScales, *, rounds_weights: bool
) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        weight = module.weight
        assert isinstance(weight, Tensor)
        if rounds_weights:
            weight = StraightThrough.apply(weight, round_weight(weight.detach(), scales))
        rows = x.reshape(-1, x.shape[-1])
        rounded = StraightThrough.apply(rows, round_input(rows.detach(), scales))
        y = (rounded @ weight.float().T).to(x.dtype)
        return y.view(*x.shape[:-1], -1)

    return forward


def _with_cache(
    module: nn.Module, linear: Callable[[Tensor], Tensor] | None, scale: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """Return a layer whose outputs, keys or values, are rounded as the cache holds them."""
    compute = linear or type(module).forward.__get__(module)
    if scale is None:
        return compute
    fixed = scale

    def forward(x: Tensor) -> Tensor:
        y = compute(x)
        rounded = round_fp8(y.detach(), fixed.to(y.device)).to(y.dtype)
        return StraightThrough.apply(y, rounded)

    return forward


def _grouped(
    name: str, module: nn.Module, scales: Mapping[str, LinearScales], *, rounds_weights: bool
) -> Callable[..., Tensor]:
    unrounded: Callable[..., Tensor] = vars(type(module))["multiply"].__get__(module)

    def multiply(rows: Tensor, weight: Tensor, counts: Tensor, numbers: Tensor | None) -> Tensor:
        [key] = [key for key, own in module.named_parameters(recurse=False) if own is weight]
        own = scales.get(f"{name}.{key}")
        if own is None:
            return unrounded(rows, weight, counts, numbers)
        if rounds_weights:
            weight = StraightThrough.apply(weight, round_weight(weight.detach(), own))
        # all experts of a layer share the scale of their inputs
        shared = LinearScales(own.format, own.weight_scale, None, _first(own.input_scale))
        rounded = StraightThrough.apply(rows, round_input(rows.detach(), shared))
        outs = []
        for chunk in expert_chunks(tuple(counts.tolist()), weight):
            parts = rounded[chunk.rows].split(chunk.sizes)
            outs += [
                part @ matrix.float().T
                for part, matrix in zip(parts, weight[chunk.experts], strict=True)
            ]
        return torch.cat(outs).to(rows.dtype)

    return multiply


def _first(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale[0]


def _cache_name(module: str) -> str:
    match = re.search(r"\.([kv])_proj$", module)
    return f"{module}.{match[1]}_scale" if match else ""
