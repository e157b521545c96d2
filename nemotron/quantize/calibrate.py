"""What a model's linear layers see: the largest magnitudes of their inputs, keys and values."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nemotron.data.batch import Batch
from nemotron.model.hybrid import HybridLM
from nemotron.model.moe import Dispatched, Experts, MoE
from nemotron.model.router import Router
from nemotron.precision.scales import StoredFormat
from nemotron.quantize.histogram import Histogram
from nemotron.quantize.presets import InputObserver, quantizable

FEW_TOKENS = 8
"""An expert that saw fewer is named in the report."""


@dataclass
class Observed:
    """What calibration found."""

    observer: InputObserver = "max"
    inputs: dict[str, Float[Tensor, ""]] = field(default_factory=dict)
    """Largest magnitude of what a matrix is multiplied with, by its name in the model; experts of
    a layer share one, so that those which saw little have that of the others."""
    cache: dict[str, Float[Tensor, ""]] = field(default_factory=dict)
    """Largest key and value of an attention layer, by the name of the projection."""
    histograms: dict[str, Histogram] = field(default_factory=dict)
    """Of the inputs, by the same names, if the observer needs them."""
    routed: dict[str, Int[Tensor, " E"]] = field(default_factory=dict)
    """Tokens that each expert was chosen for, by layer."""
    tokens: int = 0

    def see(self, name: str, x: Tensor) -> None:
        """Note an input."""
        _raise(self.inputs, name, x)
        if self.observer != "max":
            self.histograms.setdefault(name, Histogram()).add(x)

    def amax(self, name: str, format: StoredFormat) -> Float[Tensor, ""] | None:
        """Return the largest magnitude that the scale of an input reaches; None if it saw nothing.

        Blocks of NVFP4 have scales of their own, found for each input: `mse` clips them nowhere.
        """
        largest = self.inputs.get(name)
        if largest is None or not torch.isfinite(largest) or self.observer == "max":
            return largest
        if self.observer == "percentile":
            return self.histograms[name].percentile().to(largest)
        return largest if format == "nvfp4" else self.histograms[name].mse().to(largest)

    def rare(self) -> dict[str, dict[int, int]]:
        """Return the experts that saw fewer than 8 tokens, and how many, by layer."""
        return {
            name: few
            for name, counts in self.routed.items()
            if (few := {i: int(n) for i, n in enumerate(counts.tolist()) if n < FEW_TOKENS})
        }


@torch.no_grad()
def calibrate(
    model: HybridLM,
    batches: Iterable[Batch],
    observer: InputObserver = "max",
    *,
    every_expert: bool = False,
) -> Observed:
    """Run a model on batches, and return what its layers saw.

    With `every_expert` each expert also reads all tokens, beside those that it is chosen for, so
    that none lacks a range; what the layer returns does not change.
    """
    observed = Observed(observer)
    device = model.backbone.embeddings.weight.device
    with _observing(model, observed, every_expert=every_expert):
        for batch in batches:
            here = batch.to(device)
            model(here.input_ids, here.seq_idx)
            observed.tokens += batch.input_ids.numel()
    return observed


@contextmanager
def _observing(model: nn.Module, observed: Observed, *, every_expert: bool) -> Iterator[None]:
    hooks = []
    hidden = []  # layers whose call is replaced
    if every_expert:
        layers = [layer for layer in model.modules() if isinstance(layer, MoE)]
        hooks += [layer.register_forward_hook(_read_all) for layer in layers]
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
    return lambda module, inputs: observed.see(name, inputs[0])


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
        observed.see(f"{name}.{key}", rows)
        return Experts.multiply(module, rows, weight, counts, numbers)

    return multiply


def _read_all(layer: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
    """Let every expert of a layer read all of its tokens, as if the router had chosen it.

    Source: modelopt/torch/quantization/plugins/huggingface.py of NVIDIA/Model-Optimizer, which
    calibrates mixtures of experts with `top_k` raised to their number.
    """
    assert isinstance(layer, MoE)
    tokens = inputs[0].flatten(0, 1)
    latent = tokens if layer.fc1_latent_proj is None else layer.fc1_latent_proj(tokens)
    with _choosing_all(layer.gate):
        dispatched = layer.experts.dispatch(latent, layer.gate(tokens))
    Experts.forward(layer.experts, dispatched)  # without the hook that counts


@contextmanager
def _choosing_all(gate: Router) -> Iterator[None]:
    before = gate.top_k, gate.num_groups
    gate.top_k, gate.num_groups = gate.num_experts, 1
    try:
        yield
    finally:
        gate.top_k, gate.num_groups = before
