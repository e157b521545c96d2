"""The stages of a pipeline: which layers each has, what it keeps of a model, what it computes."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nemotron.data.batch import Batch
from nemotron.model.config import ModelConfig
from nemotron.model.flops import depth_flops, head_flops, layer_flops
from nemotron.model.hybrid import HybridLM
from nemotron.model.router import RoutingStats
from nemotron.parallel.config import ParallelConfig

EMBEDDING = "backbone.embeddings.weight"
"""The one parameter that two stages may hold."""

Share = Callable[[HybridLM, Tensor | None, Batch, list[RoutingStats]], Tensor]
"""Computes, as a scalar with gradients, what one stage adds to the objective of a micro-batch.

The last stage hands in the hidden states after the final norm, for the losses of head and
prediction. The others have None, and add the balance loss of their own routers.
"""

Value = tuple[float, float]
"""What a split is judged by, the second number among those that are alike in the first."""


class Stage(nn.Module):
    """Consecutive layers of a model as a pipeline calls them: hidden states in, and out.

    It is given the micro-batches beforehand and called with the number of one, so that nothing
    but hidden states goes from rank to rank. The last stage returns its share of the objective.
    """

    def __init__(self, model: HybridLM, index: int, num_stages: int) -> None:
        super().__init__()
        self.model = model
        self.index, self.num_stages = index, num_stages
        self.batches: Sequence[Batch] = ()
        self.share: Share | None = None

    @property
    def is_last(self) -> bool:
        """Whether the head is here."""
        return self.index == self.num_stages - 1

    def forward(
        self, hidden: Float[Tensor, "B T D"] | None = None, *, number: Int[Tensor, " 1"]
    ) -> Tensor:
        """Run one micro-batch; `number`, on the CPU, says which."""
        batch, share = self.batches[int(number)], self.share
        assert share is not None, "the stage was called outside a step"
        routing: list[RoutingStats] = []
        if hidden is None:
            hidden = self.model.embed(batch.input_ids, batch.candidates)
        for index, block in self.model.backbone.layers.named_children():
            name = f"backbone.layers.{index}"
            hidden, stats = block(hidden, batch.seq_idx, stats_name=name, padding=batch.padding)
            if stats is not None:
                routing.append(stats)
        if self.is_last:
            return share(self.model, self.model.backbone.norm_f(hidden), batch, routing)
        return _Attach.apply(hidden, share(self.model, None, batch, routing))


class _Attach(torch.autograd.Function):
    """Return the hidden states; their gradient also flows into the scalar."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, scalar: Tensor) -> Tensor:
        ctx.save_for_backward(scalar)
        return hidden.detach()  # no view: FSDP2 warns of those

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (scalar,) = ctx.saved_tensors
        return grad, torch.ones_like(scalar)


def shared_parameters(config: ModelConfig) -> tuple[str, ...]:
    """Return the parameters that the first and the last stage both hold.

    The last needs the embedding for multi-token prediction, or as the matrix of the head.
    """
    return (EMBEDDING,) if config.mtp_pattern or config.tie_word_embeddings else ()


def cut(model: HybridLM, layers: range, *, is_first: bool, is_last: bool) -> tuple[str, ...]:
    """Remove from a model, in place, what one stage does not need; names stay those of the whole.

    Returns the parameters here of which an earlier stage has the original: the copy has its
    initial value, its gradient is only a part (`pipeline.sync_copies`), and it counts for nothing.
    """
    backbone, shared = model.backbone, shared_parameters(model.config)
    blocks = {str(index): backbone.layers[index] for index in layers}
    backbone.register_module("layers", nn.ModuleDict(blocks))
    if not is_first and not (is_last and shared):
        backbone.register_module("embeddings", None)
    if not is_first:
        model.candidates = None
    if not is_last:
        backbone.register_module("norm_f", None)
        model.register_module("lm_head", None)
        model.mtp = model.edit_heads = None
    return shared if is_last and not is_first else ()


def split_stages(
    model: ModelConfig, parallel: ParallelConfig, num_stages: int, seq_len: int, num_depths: int
) -> list[range]:
    """Return the layers of each stage, as the recipe writes them or so that they cost alike.

    The cost of a stage is its forward FLOPs for a token of a row of `seq_len` tokens; head and
    `num_depths` depths of prediction are the last one's. Of the splits whose dearest stage is
    cheapest, the one is taken that parts the fewest M from the E after them, then the evenest.
    """
    pattern = model.hybrid_override_pattern
    if parallel.pipeline.stages != "auto":
        parts = parallel.pipeline.stages.split("|")
        assert "".join(parts) == pattern, (parts, pattern)
        assert len(parts) == num_stages, (parts, num_stages)
        bounds = [0, *itertools.accumulate(len(part) for part in parts)]
        return [range(a, b) for a, b in itertools.pairwise(bounds)]
    layers = (layer_flops(model, letter, seq_len) for letter in pattern)
    before = list(itertools.accumulate(layers, initial=0.0))
    before[-1] += head_flops(model) + num_depths * depth_flops(model, seq_len)

    def cost(stage: range) -> float:
        return before[stage.stop] - before[stage.start]

    def uneven(stage: range) -> Value:
        parts_pair = pattern[: stage.start].endswith("M") and pattern[stage.start] == "E"
        return (
            (float(parts_pair), cost(stage) ** 2) if cost(stage) <= limit else (math.inf, math.inf)
        )

    cheapest = _best_split(len(pattern), num_stages, lambda stage: (cost(stage), 0.0), max)
    limit = max(map(cost, cheapest))
    return _best_split(len(pattern), num_stages, uneven, lambda a, b: (a[0] + b[0], a[1] + b[1]))


def _best_split(
    num_layers: int,
    num_stages: int,
    value: Callable[[range], Value],
    join: Callable[[Value, Value], Value],
) -> list[range]:
    """Return the stages, none of them empty, whose values joined from first to last are least."""
    assert num_layers >= num_stages, (num_layers, num_stages)

    @functools.cache
    def best(num_stages: int, end: int) -> tuple[Value, list[range]]:
        if num_stages == 1:
            return value(range(end)), [range(end)]
        options = [
            (join(best(num_stages - 1, start)[0], value(range(start, end))), start)
            for start in range(num_stages - 1, end)
        ]
        total, start = min(options)
        return total, [*best(num_stages - 1, start)[1], range(start, end)]

    return best(num_stages, num_layers)[1]
