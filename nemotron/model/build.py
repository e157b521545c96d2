"""Building a model: without memory, or around weights that are there already."""

from collections.abc import Mapping

import torch
from torch import Tensor

from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM


def build_on_meta(config: ModelConfig) -> HybridLM:
    """Return the model without memory behind its tensors."""
    with torch.device("meta"):
        return HybridLM(config)


def shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Return the shape of every parameter and buffer."""
    return {name: tensor.shape for name, tensor in build_on_meta(config).state_dict().items()}


def build_around(config: ModelConfig, weights: Mapping[str, Tensor]) -> HybridLM:
    """Return the model that holds these very tensors; nothing is copied."""
    model = build_on_meta(config)
    model.load_state_dict(weights, assign=True)
    if config.tie_word_embeddings:
        # assigning gave each of the two names a parameter of its own
        model.lm_head.weight = model.backbone.embeddings.weight
    return model
