"""What a step minimizes: terms as sums over tokens, which only an objective's `combine` divides."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.data.batch import Batch
from nemotron.model.hybrid import HybridLM
from nemotron.model.language import Languages
from nemotron.model.router import RoutingStats
from nemotron.parallel.runtime import Ranks
from nemotron.train.auxiliary import Auxiliary, LanguageObjective, total_weight
from nemotron.train.config import TextConfig


class Objective(Protocol):
    """Named terms, each a sum over tokens divided by its count in the whole step.

    Micro-batches, ranks and stages of a pipeline compute `sums` of what they have; the counts are
    known before any forward pass, so that every part is differentiated with the same divisors.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the terms, as in `loss/NAME` of the metrics.

        A step is skipped if the count of the first term is 0.
        """
        ...

    @property
    def local_names(self) -> frozenset[str]:
        """Terms that a rank sums over its own tokens where tensor-parallel ranks share a row.

        All other terms are then sums over the whole row, the same on each of those ranks.
        """
        ...

    def counts(self, batch: Batch) -> Float[Tensor, " terms"]:
        """Return the divisor of each term for these rows, float64, on the CPU."""
        ...

    def sums(
        self,
        model: HybridLM,
        hidden: Float[Tensor, "B T D"] | None,
        batch: Batch,
        routing: list[RoutingStats],
    ) -> Float[Tensor, " terms"]:
        """Return the terms of a micro-batch, with gradients.

        `hidden` is what the trunk returns, None on a stage of a pipeline without the head.
        `routing` has the statistics of the routers that ran; further calls add theirs.
        """
        ...

    def combine(
        self, sums: Float[Tensor, " terms"], counts: Float[Tensor, " terms"]
    ) -> Float[Tensor, ""]:
        """Divide the sums by the counts of the whole step and weigh them.

        This is linear in the sums: the results of the micro-batches of a step add up to its loss.
        """
        ...


@dataclass(frozen=True)
class PretrainObjective(LanguageObjective):
    """Next-token cross entropy, multi-token prediction and the routers' balance loss."""

    auxiliary: Auxiliary

    @classmethod
    def of(cls, config: TextConfig) -> "PretrainObjective":
        """Return the objective of a run, with the terms that its model has."""
        has_routers, has_languages = bool(config.model.moe_layers), config.knows_languages
        return cls(Auxiliary(config.loss, config.num_depths, has_routers, has_languages))

    @property
    def factors(self) -> dict[str, float]:
        """`main`, the next token's."""
        return {"main": 1.0}

    def own_counts(self, batch: Batch) -> list[float]:
        """Return the weight of the labels, their number where all count 1."""
        return [total_weight(batch.labels, batch.loss_weight)]

    def own_sums(
        self, model: HybridLM, hidden: Float[Tensor, "B T D"], batch: Batch
    ) -> list[Float[Tensor, ""]]:
        """Return a sum of nats."""
        return [model.lm_head.loss(hidden, batch.labels, batch.loss_weight)]


def languages_of(batch: Batch) -> Languages | None:
    """Return what a batch says of the language of its tokens."""
    if batch.languages is None:
        return None
    return Languages(batch.languages, batch.languages_decide)


def compute_sums(
    objective: Objective, model: HybridLM, batch: Batch
) -> tuple[Float[Tensor, " terms"], list[RoutingStats]]:
    """Run a model on a micro-batch; returns the terms, and the statistics of its routers."""
    routing: list[RoutingStats] = []
    hidden = model(
        batch.input_ids,
        batch.seq_idx,
        routing=routing,
        padding=batch.padding,
        candidates=batch.candidates,
        languages=languages_of(batch),
        experts=batch.experts,
    )
    return objective.sums(model, hidden, batch, routing), routing


class StepSums:
    """Detached sums over the micro-batches so far, on the device."""

    def __init__(
        self, objective: Objective, layers: Sequence[str], num_experts: int, device: torch.device
    ) -> None:
        """Begin at zero; `layers` names the mixture layers of the whole model."""
        self._names, self._local = objective.names, objective.local_names
        self.terms: Float[Tensor, " terms"] = torch.zeros(len(self._names), device=device)
        load = torch.zeros(len(layers), num_experts, dtype=torch.int64, device=device)
        self.load: dict[str, Tensor] = dict(zip(layers, load, strict=True))
        """Tokens per expert, by the name of the mixture layer."""
        self._all_load = load

    def add(self, sums: Float[Tensor, " terms"], routing: Sequence[RoutingStats]) -> None:
        """Add one micro-batch."""
        self.terms += sums.detach()
        for stats in routing:
            self.load[stats.name] += stats.counts

    def add_up(self, ranks: Ranks, others: Tensor, *, counts_loss: bool) -> Tensor:
        """Add up over all ranks in one exchange, together with a vector of others.

        `counts_loss` is false on all but one of the ranks that computed the same terms.
        """
        if not ranks.grouped:
            return others
        zero = torch.zeros_like(self.terms[0])
        terms = [
            term if counts_loss or name in self._local else zero
            for name, term in zip(self._names, self.terms.unbind(), strict=True)
        ]
        parts = [torch.stack(terms), others, self._all_load.flatten()]
        total = ranks.sum(torch.cat([part.double() for part in parts]))
        summed, others, load = total.split([part.numel() for part in parts])
        self.terms = summed.to(self.terms.dtype)
        self._all_load.copy_(load.view_as(self._all_load))
        return others

    def values(self, counts: Float[Tensor, " terms"]) -> dict[str, float]:
        """Return each term per count; a term that counts nothing is left out.

        Names are those in the metrics: `loss/NAME`, and as they are where they have a section.
        """
        terms = zip(self._names, self.terms.tolist(), counts.tolist(), strict=True)
        named = ((n if "/" in n else f"loss/{n}", total, count) for n, total, count in terms)
        return {name: total / count for name, total, count in named if count}
