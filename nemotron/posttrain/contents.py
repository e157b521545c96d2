"""Whether files and models beside the data are the same on all ranks, and in a resumed run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from nemotron.errors import UserError
from nemotron.model.hybrid import HybridLM
from nemotron.precision.static import ModelScales
from nemotron.train.reliability.replicas import checksum

Contents = dict[str, str]
"""Hashes, by the key of the recipe and the path that it names, such as `teacher = runs/large`."""

KEY = "contents"
"""Where they stand in the state of a source of batches."""


def model_contents(key: str, path: str | Path | None, model: HybridLM | None) -> Contents:
    """Return the hash of a model's weights; nothing without a model."""
    return {} if model is None else weights_contents(key, path, model.state_dict())


def weights_contents(key: str, path: str | Path | None, weights: Mapping[str, Tensor]) -> Contents:
    """Return the hash of weights by their names."""
    digest = xxhash.xxh128()
    for name, tensor in weights.items():
        digest.update(f"{name} {checksum(tensor).item():x}\n".encode())
    return {f"{key} = {path}": digest.hexdigest()}


def scales_contents(key: str, path: str | Path, scales: ModelScales) -> Contents:
    """Return the hash of the fixed scales of a model."""
    digest = xxhash.xxh128()
    tensors = {
        f"{layer} {name}": tensor
        for layer, own in scales.linears.items()
        for name, tensor in vars(own).items()
        if isinstance(tensor, Tensor)
    }
    for name, tensor in sorted((tensors | dict(scales.cache)).items()):
        digest.update(f"{name} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return {f"{key} = {path}": digest.hexdigest()}


def check_contents(saved: Mapping[str, Any], own: Contents, step: int) -> None:
    """Compare with the state of a checkpoint; what has another path now was changed knowingly.

    Raises:
        UserError: when something has changed under its name.
    """
    found = saved.get(KEY, {})
    for place, digest in own.items() if isinstance(found, dict) else ():
        if found.get(place, digest) != digest:
            raise UserError(
                f"{place} has another content than at step {step} of this run; restore it, or "
                "begin a new run with init_from."
            )
