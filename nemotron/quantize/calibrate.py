"""What a model's linear layers see: the largest magnitudes of their inputs, keys and values."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nemotron.data.batch import Batch
from nemotron.model.hybrid import HybridLM
from nemotron.model.moe import Dispatched, Experts
from nemotron.quantize.presets import quantizable

FEW_TOKENS = 8
"""An expert that saw fewer is named in the report."""


@dataclass
class Observed:
    """What calibration found."""

    inputs: dict[str, Float[Tensor, ""]] = field(default_factory=dict)
    """Largest magnitude of what a matrix is multiplied with, by its name in the model; experts of
    a layer share one, so that those which saw little have that of the others."""
    cache: dict[str, Float[Tensor, ""]] = field(default_factory=dict)
    """Largest key and value of an attention layer, by the name of the projection."""
    routed: dict[str, Int[Tensor, " E"]] = field(default_factory=dict)
    """Tokens that each expert saw, by layer."""
    tokens: int = 0

    def rare(self) -> dict[str, dict[int, int]]:
        """Return the experts that saw fewer than 8 tokens, and how many, by layer."""
        return {
            name: few
            for name, counts in self.routed.items()
            if (few := {i: int(n) for i, n in enumerate(counts.tolist()) if n < FEW_TOKENS})
        }


@torch.no_grad()
def calibrate(model: HybridLM, batches: Iterable[Batch]) -> Observed:
    """Run a model on batches, and return what its layers saw."""
    observed = Observed()
    device = model.backbone.embeddings.weight.device
    with _observing(model, observed):
        for batch in batches:
            here = batch.to(device)
            model(here.input_ids, here.seq_idx)
            observed.tokens += batch.input_ids.numel()
    return observed


@contextmanager
def _observing(model: nn.Module, observed: Observed) -> Iterator[None]:
    hooks = []
    hidden = []  # layers whose call is replaced
    for name in quantizable(model):
        module = model.get_submodule(name)
        if isinstance(module, Experts):
            hooks.append(module.register_forward_pre_hook(_count(name, observed)))
            vars(module)["multiply"] = _watch(name, module, observed)
            hidden.append(module)
            continue
        hooks.append(module.register_forward_pre_hook(_see_input(name, observed)))
        if name.endswith((".k_proj", ".v_proj")):
            hooks.append(module.register_forward_hook(_see_output(name, observed)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in hidden:
            vars(module).pop("multiply")


def _raise(table: dict[str, Tensor], name: str, x: Tensor) -> None:
    if x.numel():
        found = x.detach().abs().amax().float()
        table[name] = torch.maximum(table[name], found) if name in table else found


def _see_input(name: str, observed: Observed):  # type: ignore[no-untyped-def]  # a hook of torch
    return lambda module, inputs: _raise(observed.inputs, name, inputs[0])


def _see_output(name: str, observed: Observed):  # type: ignore[no-untyped-def]  # a hook of torch
    return lambda module, inputs, output: _raise(observed.cache, name, output)


def _count(name: str, observed: Observed):  # type: ignore[no-untyped-def]  # a hook of torch
    def hook(module: nn.Module, inputs: tuple[Dispatched]) -> None:
        counts = inputs[0].counts.cpu()
        observed.routed[name] = observed.routed.get(name, torch.zeros_like(counts)) + counts

    return hook


def _watch(name: str, module: Experts, observed: Observed):  # type: ignore[no-untyped-def]  # a hook
    def multiply(rows: Tensor, weight: Tensor, counts: Tensor, numbers: Tensor | None) -> Tensor:
        [key] = [key for key, own in module.named_parameters(recurse=False) if own is weight]
        _raise(observed.inputs, f"{name}.{key}", rows)
        return Experts.multiply(module, rows, weight, counts, numbers)

    return multiply
