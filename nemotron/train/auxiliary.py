"""The terms that objectives share, multi-token prediction and the balance loss, and their sums."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.data.batch import NO_LABEL, Batch
from nemotron.model.hybrid import HybridLM
from nemotron.model.language import UNKNOWN
from nemotron.model.router import RoutingStats
from nemotron.train.config import LossConfig


@dataclass(frozen=True)
class Auxiliary:
    """Cross entropy of tokens further ahead, and the balance loss of mixture layers.

    factor / depths * sum of depths + coefficient * balance loss. Every objective of a language
    model may add these terms after its own.
    """

    config: LossConfig
    num_depths: int
    """Depths of multi-token prediction; batches are looked ahead as far."""
    has_routers: bool = True
    has_languages: bool = False
    """Whether batches say of tokens which language they are."""

    @property
    def names(self) -> tuple[str, ...]:
        """`mtp_1` and so on, `aux`, `lid`."""
        depths = (f"mtp_{depth}" for depth in range(1, self.num_depths + 1))
        further = [*(["aux"] if self.has_routers else []), *(["lid"] if self.has_languages else [])]
        return (*depths, *further)

    @property
    def local_names(self) -> frozenset[str]:
        """Those of routers and gate: head and prediction return the loss of all ranks' tokens."""
        return frozenset({"aux", "lid"})

    def counts(self, batch: Batch) -> list[float]:
        """Return the weight of each term's targets, their number where all count 1.

        The balance loss counts every position in a document, with or without a target.
        """
        assert len(batch.ahead) == self.num_depths, (len(batch.ahead), self.num_depths)
        counts = [total_weight(depth.labels, depth.loss_weight) for depth in batch.ahead]
        counts += [batch.num_tokens] if self.has_routers else []
        return counts + ([_num_known(batch)] if self.has_languages else [])

    def sums(
        self,
        model: HybridLM,
        hidden: Float[Tensor, "B T D"] | None,
        batch: Batch,
        routing: list[RoutingStats],
    ) -> list[Float[Tensor, ""]]:
        """Return sums of nats; the balance loss is summed over tokens and layers.

        Source of the multi-token-prediction term: NVIDIA/Megatron-LM:
        megatron/core/transformer/multi_token_prediction.py, process_mtp_loss.
        """
        trunk_calls = len(routing)
        zero = torch.zeros((), device=batch.labels.device)
        terms = [zero] * self.num_depths
        if hidden is not None:
            terms = self._ahead(model, hidden, batch, routing)
        if self.has_routers:
            aux = zero
            for index, stats in enumerate(routing):
                # the shared block is called once per depth: its loss is averaged over depths
                aux = aux + stats.aux_loss_sum / (1 if index < trunk_calls else self.num_depths)
            terms.append(aux)
        if self.has_languages:
            found = [s.language_loss_sum for s in routing if s.language_loss_sum is not None]
            terms.append(sum(found, zero))
        return terms

    def _ahead(
        self, model: HybridLM, hidden: Tensor, batch: Batch, routing: list[RoutingStats]
    ) -> list[Tensor]:
        if not self.num_depths:
            return []
        inputs, detach = [depth.input_ids for depth in batch.ahead], self.config.mtp_detach_heads
        further = model.mtp_hidden(hidden, inputs, batch.seq_idx, detach, routing, batch.padding)
        return [
            model.lm_head.loss(depth_hidden, depth.labels, depth.loss_weight, detach)
            for depth_hidden, depth in zip(further, batch.ahead, strict=True)
        ]

    @property
    def factors(self) -> list[float]:
        """What the mean of each term is multiplied by in the loss."""
        factors = [self.config.mtp_loss_factor / max(self.num_depths, 1)] * self.num_depths
        factors += [self.config.moe_aux_loss_coeff] if self.has_routers else []
        return factors + ([self.config.lid_coeff] if self.has_languages else [])


class LanguageObjective(ABC):
    """An `Objective` with terms of its own, and the auxiliary ones after them.

    A subclass says what its own terms count, sum up and weigh.
    """

    auxiliary: Auxiliary

    @property
    @abstractmethod
    def factors(self) -> Mapping[str, float | None]:
        """What the mean of each own term is multiplied by in the loss, by its name.

        A term without a factor is only logged; the first one has a factor.
        """

    @abstractmethod
    def own_counts(self, batch: Batch) -> list[float]:
        """Return the divisor of each own term."""

    @abstractmethod
    def own_sums(
        self, model: HybridLM, hidden: Float[Tensor, "B T D"], batch: Batch
    ) -> list[Float[Tensor, ""]]:
        """Return the own terms of a micro-batch, with gradients."""

    @property
    def names(self) -> tuple[str, ...]:
        """Those of the own terms, then those of the auxiliary ones."""
        return (*self.factors, *self.auxiliary.names)

    @property
    def local_names(self) -> frozenset[str]:
        """Those of the auxiliary terms."""
        return self.auxiliary.local_names

    def counts(self, batch: Batch) -> Float[Tensor, " terms"]:
        """Return the divisor of each term, float64, on the CPU."""
        counts = [*self.own_counts(batch), *self.auxiliary.counts(batch)]
        return torch.tensor(counts, dtype=torch.float64)

    def sums(
        self,
        model: HybridLM,
        hidden: Float[Tensor, "B T D"] | None,
        batch: Batch,
        routing: list[RoutingStats],
    ) -> Float[Tensor, " terms"]:
        """Return the terms of a micro-batch; the own ones are 0 on a stage without the head."""
        own = [torch.zeros((), device=batch.labels.device)] * len(self.factors)
        if hidden is not None:
            own = self.own_sums(model, hidden, batch)
        return torch.stack([*own, *self.auxiliary.sums(model, hidden, batch, routing)])

    def combine(
        self, sums: Float[Tensor, " terms"], counts: Float[Tensor, " terms"]
    ) -> Float[Tensor, ""]:
        """Return the mean of each term, weighted as the recipe says."""
        factors = [*self.factors.values(), *self.auxiliary.factors]
        return _weighted_means(sums, counts, factors)


def _num_known(batch: Batch) -> int:
    """Return how many tokens inside documents have a language that is known."""
    if batch.languages is None:
        return 0
    known = batch.languages != UNKNOWN
    return int((known if batch.padding is None else known & ~batch.padding).sum())


def total_weight(labels: Tensor, weights: Tensor | None) -> float:
    """Return the sum of the weights of all labels that count."""
    counted = labels != NO_LABEL
    return int(counted.sum()) if weights is None else float(weights[counted].double().sum())


def _weighted_means(
    sums: Float[Tensor, " terms"],
    counts: Float[Tensor, " terms"],
    factors: Sequence[float | None],
) -> Float[Tensor, ""]:
    """Divide each sum by its count, and add up the quotients times their factors."""
    (first, count), *others = zip(sums.unbind(), counts.tolist(), strict=True)
    (own, *further) = factors
    assert own is not None, "the first term is a part of the loss"
    loss = first / max(count, 1) if own == 1 else own * first / max(count, 1)
    for factor, (term, count) in zip(further, others, strict=True):
        if factor is not None:
            loss = loss + factor * term / max(count, 1)
    return loss
