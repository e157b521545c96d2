"""What each format of each group of layers would cost in quality, before any is chosen.

By gradients: the change of a layer's output times the gradient of the loss at it, squared and
summed, which is the second-order term of the loss with Fisher's matrix for the curvature. One
forward and backward serve all layers and formats. By divergence: one format of one group at a time.
Source: modelopt/torch/quantization/algorithms.py of NVIDIA/Model-Optimizer.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nemotron.data.batch import NO_LABEL, Batch
from nemotron.model.hybrid import HybridLM
from nemotron.model.linear import ROWS_COMPARED
from nemotron.model.moe import Experts
from nemotron.precision.static import ModelScales, attach, detach, layer_call
from nemotron.quantize.groups import Group

Score = Literal["fisher", "kl"]
Scores = dict[str, dict[str, float]]
"""By group, then by format."""
Choices = Mapping[str, ModelScales]
"""For each format, the scales of all layers in it."""


def fisher_scores(
    model: HybridLM, groups: Sequence[Group], choices: Choices, batches: Iterable[Batch]
) -> Scores:
    """Return the scores by gradients over batches."""
    scores: Scores = {group.name: dict.fromkeys(group.formats[:-1], 0.0) for group in groups}
    table = model.backbone.embeddings.weight
    hooks = [
        model.get_submodule(layer).register_forward_hook(
            partial(_watch, layer, scores[group.name], choices)
        )
        for group in groups
        for layer in group.layers
    ]
    table.requires_grad = True  # so that everything behind it has a gradient, and nothing else does
    try:
        for batch in batches:
            here = batch.to(table.device)
            nats = model.lm_head.loss(model(here.input_ids, here.seq_idx), here.labels)
            (nats / max(1, batch.num_loss_tokens)).backward()
    finally:
        for hook in hooks:
            hook.remove()
        table.requires_grad = False
        table.grad = None
    return scores


def _watch(
    layer: str,
    scores: dict[str, float],
    choices: Choices,
    module: nn.Module,
    inputs: tuple[Any, ...],
    output: Tensor,
) -> None:
    """Compute a layer's output in each format, and score its change when the gradient comes."""
    with torch.no_grad():
        changes = {
            format: _computed(layer, module, choices[format], inputs[0]) - output
            for format in scores
        }

    def score(gradient: Tensor) -> None:
        for format, change in changes.items():
            weighed = gradient.float() * change.float()
            scores[format] += weighed.double().square().sum().item()

    output.register_hook(score)


def _computed(layer: str, module: nn.Module, scales: ModelScales, x: Any) -> Tensor:
    """Return the output of a layer with these scales; of experts, their weighted sum."""
    call = layer_call(layer, module, scales, rounds_weights=True)
    if not isinstance(module, Experts):
        return call(x)
    vars(module)["multiply"] = call
    try:
        return Experts.forward(module, x)
    finally:
        vars(module).pop("multiply")


@torch.no_grad()
def kl_scores(
    model: HybridLM, groups: Sequence[Group], choices: Choices, batches: Sequence[Batch]
) -> Scores:
    """Return the summed divergence from the unquantized model, one format of a group at a time."""
    device = model.backbone.embeddings.weight.device
    here = [batch.to(device) for batch in batches]
    hidden = [model(batch.input_ids, batch.seq_idx) for batch in here]
    scores: Scores = {}
    for group in groups:
        scores[group.name] = {}
        for format in group.formats[:-1]:
            attach(model, _only(choices[format], group), rounds_weights=True)
            try:
                parts = [
                    _divergence(model, theirs, batch)
                    for theirs, batch in zip(hidden, here, strict=True)
                ]
            finally:
                detach(model)
            scores[group.name][format] = sum(parts)
    return scores


def _only(scales: ModelScales, group: Group) -> ModelScales:
    def is_own(name: str) -> bool:
        return any(name == layer or name.startswith(f"{layer}.") for layer in group.layers)

    return ModelScales({name: own for name, own in scales.linears.items() if is_own(name)})


def _divergence(model: HybridLM, theirs: Tensor, batch: Batch) -> float:
    counted = batch.labels != NO_LABEL
    ours = model(batch.input_ids, batch.seq_idx)[counted]
    theirs, total = theirs[counted], 0.0
    for first in range(0, theirs.shape[0], ROWS_COMPARED):
        which = slice(first, first + ROWS_COMPARED)
        p = model.logits(theirs[which]).float().log_softmax(-1)
        q = model.logits(ours[which]).float().log_softmax(-1)
        total += (p.exp() * (p - q)).sum(-1).double().sum().item()
    return total


SCORES: Mapping[Score, Callable[..., Scores]] = {"fisher": fisher_scores, "kl": kl_scores}
