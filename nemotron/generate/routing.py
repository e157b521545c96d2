"""Which experts the routers of a model choose, recorded while it runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor, nn

from nemotron.generate.sample import Sample
from nemotron.model.hybrid import HybridLM
from nemotron.model.router import Routing, routers


class RoutingRecord:
    """The choices of the newest pass, for each mixture layer in the order of the model."""

    def __init__(self) -> None:
        self.layers: list[Int[Tensor, "M K"]] = []

    def experts(self, num_rows: int) -> Int[Tensor, "B T layers K"]:
        """Return the experts of every token of the pass, as int16."""
        stacked = torch.stack(self.layers, dim=1).to(torch.int16)  # [M, layers, K]
        return stacked.unflatten(0, (num_rows, -1))


@contextmanager
def recorded(model: HybridLM, *, on: bool) -> Iterator[RoutingRecord]:
    """Record the routers' choices of one pass, at no cost where `on` is false."""
    record = RoutingRecord()

    def keep(module: nn.Module, inputs: object, routing: Routing) -> None:
        record.layers.append(routing.experts)

    handles = []
    if on:
        found = routers(model.backbone).values()
        handles = [router.register_forward_hook(keep) for router in found]
        if model.steps is not None:
            model.steps.record = record.layers
    try:
        yield record
    finally:
        if model.steps is not None:
            model.steps.record = None
        for handle in handles:
            handle.remove()


def keep_experts(
    experts: Int[Tensor, "B T layers K"],
    samples: Sequence[Sample],
    starts: Sequence[int],
    counts: Sequence[int] | None = None,
) -> None:
    """Give the samples that want them the experts of their tokens in a pass, or of the first ones.

    `starts` are the places in the texts where the pass began.
    """
    experts = experts.cpu()
    for row, (sample, start) in enumerate(zip(samples, starts, strict=True)):
        if sample.request.experts:
            own = experts[row] if counts is None else experts[row, : counts[row]]
            sample.add_experts(own, start)
