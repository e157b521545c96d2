"""How many bits the weights of a model take."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from nemotron.precision.fixed_scales import BITS
from nemotron.precision.scales import StoredFormat
from nemotron.quantize.presets import quantizable


@dataclass(frozen=True)
class Size:
    """Bits of a weight on average, and the layers of each format."""

    of_linears: float
    """Over the linear layers that a format may be given to: what a budget of bits is about."""
    of_model: float
    """Over all parameters, of which the others are in bfloat16."""
    layers: Mapping[str, int]
    parameters: Mapping[str, int]
    """Weights in each format, over all parameters."""


def num_weights(module: nn.Module) -> int:
    """Return the weights of a linear layer, or of all experts of a layer."""
    return sum(weight.numel() for weight in module.parameters(recurse=False))


def size_of(model: nn.Module, table: Mapping[str, StoredFormat]) -> Size:
    """Return the size of a model whose layers have these formats, all others bfloat16."""
    layers: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    for name in quantizable(model):
        format = table.get(name, "bf16")
        layers[format] += 1
        parameters[format] += num_weights(model.get_submodule(name))
    of_linears = _bits(parameters)
    everything = sum(parameter.numel() for parameter in model.parameters())
    parameters["bf16"] += everything - parameters.total()
    return Size(of_linears, _bits(parameters), dict(layers), dict(parameters))


def _bits(parameters: Mapping[str, int]) -> float:
    total = sum(parameters.values())
    return sum(BITS[format] * number for format, number in parameters.items()) / max(1, total)
