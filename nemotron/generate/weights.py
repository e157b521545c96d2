"""Weights in the form in which decoding reads them fastest; a model so prepared only generates."""

from nemotron.model.hybrid import HybridLM
from nemotron.model.linear import Linear
from nemotron.model.moe import Experts


def prepare_weights(model: HybridLM) -> HybridLM:
    """Cast the matrices to the compute dtype once, in place of once per token; return the model."""
    dtype = model.compute_dtype
    for module in model.modules():
        if dtype is not None and isinstance(module, Linear | Experts):
            module.to(dtype)
    return model.requires_grad_(False)
