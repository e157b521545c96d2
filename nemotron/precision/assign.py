"""The table of a model: each linear layer's format, why, and what computes its products."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from nemotron.precision.backends import choose, format_call
from nemotron.precision.config import PrecisionConfig
from nemotron.precision.policy import Assignment, kind_of, resolve


def preset_at(config: PrecisionConfig, step: int) -> str:
    """Return the preset that holds at a step."""
    presets = [config.preset, *(s.preset for s in config.switches if s.step <= step)]
    return presets[-1]


def assign(
    model: nn.Module, config: PrecisionConfig, preset: str, device: torch.device | None = None
) -> list[Assignment]:
    """Return the table of a model, which may lie on the meta device.

    Backends are those for `device`, or for where a run of this machine would be.

    Raises:
        UserError: when a rule decides nothing, or a named backend is not fit for a layer.
    """
    layers = model.get_submodule("backbone.layers")
    assert isinstance(layers, nn.ModuleList)
    where = device_of(model) if device is None else device
    return [
        with_backend(line, config, model.get_submodule(line.module), where)
        for line in resolve(linear_layers(model), len(layers), config, preset)
    ]


def device_of(model: nn.Module) -> torch.device:
    """Return where a model lies, or would lie if it is not built yet."""
    device = next(model.parameters()).device
    if device.type == "meta":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device


def linear_layers(model: nn.Module) -> Sequence[str]:
    """Return the names of all modules that a format can be given to."""
    return [name for name, _ in model.named_modules() if kind_of(name) is not None]


def with_backend(
    line: Assignment,
    config: PrecisionConfig,
    module: nn.Module,
    device: torch.device,
    *,
    is_split: bool = False,
) -> Assignment:
    """Choose what computes a line's products; `is_split` as in `format_call`."""
    if line.format == "bf16":
        return line
    shape = next(module.parameters(recurse=False)).shape
    call = format_call(line.format, device, shape, is_split=is_split)
    return replace(line, backend=choose(config.backend, call, line.module).name)
