"""Layers that get one format together: what engines fuse, and all experts of a layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from torch import nn

from nemotron.model.hybrid import HybridLM
from nemotron.model.moe import Experts
from nemotron.precision.fixed_scales import BITS
from nemotron.precision.scales import StoredFormat
from nemotron.quantize.presets import fits, quantizable
from nemotron.quantize.scales import fused_group
from nemotron.quantize.size import num_weights

Format = StoredFormat | Literal["bf16"]
Cost = Literal["weights", "active"]
"""What a budget of bits is a mean over: all weights, or those that one token needs, of which there
are fewer in routed experts."""
FORMATS: tuple[StoredFormat, ...] = ("nvfp4", "fp8")
"""What a search chooses from, beside bfloat16."""


@dataclass(frozen=True)
class Group:
    """Layers of one format."""

    name: str
    layers: tuple[str, ...]
    weights: int
    """How many the cost counts: all, or those that one token needs."""
    formats: tuple[Format, ...]
    """Those that all layers can be stored in, bfloat16 last."""

    def cost(self, format: Format) -> int:
        """Return the half bits that its weights take."""
        return round(2 * BITS[format]) * self.weights

    def table(self, format: StoredFormat) -> Mapping[str, StoredFormat]:
        """Return the format of each layer."""
        return dict.fromkeys(self.layers, format)


def find_groups(model: HybridLM, cost: Cost = "weights") -> list[Group]:
    """Return the groups of a model in the order of its layers.

    Source of the cost `active`: modelopt/torch/quantization/_auto_quantize_cost.py of
    NVIDIA/Model-Optimizer (`active_moe`).
    """
    config = model.config
    share = Fraction(1)
    if cost == "active" and config.moe_layers:
        share = Fraction(config.num_experts_per_tok, config.n_routed_experts)
    members: dict[str, list[str]] = {}
    for name in quantizable(model):
        members.setdefault(fused_group(name), []).append(name)
    return [_group(model, name, layers, share) for name, layers in members.items()]


def _group(model: nn.Module, name: str, layers: list[str], share: Fraction) -> Group:
    modules = [model.get_submodule(layer) for layer in layers]
    able = [format for format in FORMATS if all(fits(module, format) for module in modules)]
    weights = sum(
        int(num_weights(module) * (share if isinstance(module, Experts) else 1))
        for module in modules
    )
    return Group(name, tuple(layers), weights, (*able, "bf16"))
