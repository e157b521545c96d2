"""The kinds of parameters, under which norms of gradients are reported and parts are frozen."""

import re
from collections.abc import Iterable

from nemotron.model.config import LAYER_KINDS, ModelConfig
from nemotron.model.parameters import correction_parameters

PARTS_OF_MOE = {
    "mixer.experts.": "experts",
    "mixer.shared_experts.": "shared",
    "mixer.fc1_latent_proj.": "latent",
    "mixer.fc2_latent_proj.": "latent",
}
"""Kinds inside a mixture layer; the rest, norm and gate, is router."""


def kind_of(name: str, config: ModelConfig) -> str:
    """Return the group under which a parameter's gradient norm is reported."""
    if name.startswith("mtp."):
        return "mtp"
    if name.startswith("backbone.embeddings."):
        return "embed"
    if name.startswith(("candidates.", "edit_heads.")):
        return "correction"
    if name.startswith("language."):
        return "language"
    layer = re.match(r"backbone\.layers\.(\d+)\.(.*)", name)
    if layer is None:
        return "head"  # lm_head and the norm before it
    kind = LAYER_KINDS[config.hybrid_override_pattern[int(layer[1])]]
    if kind != "moe":
        return kind
    parts = (part for start, part in PARTS_OF_MOE.items() if layer[2].startswith(start))
    return next(parts, "router")


def kinds(config: ModelConfig) -> list[str]:
    """Return every kind that parameters of this model have, in the order of the stack."""
    pattern = config.hybrid_override_pattern
    layers = [LAYER_KINDS[letter] for letter in dict.fromkeys(pattern)]
    moe = ["router", "experts", "shared", *(["latent"] if config.moe_latent_size else [])]
    parts = [part for kind in layers for part in (moe if kind == "moe" else [kind])]
    further = [
        *(["mtp"] if config.mtp_pattern else []),
        *(["correction"] if correction_parameters(config) else []),
        *(["language"] if config.language_experts is not None else []),
    ]
    return ["embed", *parts, "head", *further]


def parameter_kinds(names: Iterable[str], config: ModelConfig) -> dict[str, str]:
    """Return the kind of every named parameter."""
    return {name: kind_of(name, config) for name in names}
