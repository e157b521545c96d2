"""What a step minimises: terms as sums over tokens, which only an objective's `combine` divides."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.data.batch import NO_LABEL, Batch
from nemotron.model.hybrid import HybridLM
from nemotron.model.router import RoutingStats
from nemotron.parallel.runtime import Ranks
from nemotron.train.config import LossConfig, PretrainConfig


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
class PretrainObjective:
    """Next-token cross entropy, multi-token prediction and the routers' balance loss.

    main + factor / depths * sum of depths + coefficient * balance loss.
    """

    config: LossConfig
    num_depths: int
    """Depths of multi-token prediction; batches are looked ahead as far."""
    has_routers: bool = True

    @classmethod
    def of(cls, config: PretrainConfig) -> "PretrainObjective":
        """Return the objective of a run, with the terms that its model has."""
        return cls(config.loss, config.num_depths, bool(config.model.moe_layers))

    @property
    def names(self) -> tuple[str, ...]:
        """`main`, `mtp_1` and so on, `aux`."""
        depths = (f"mtp_{depth}" for depth in range(1, self.num_depths + 1))
        return ("main", *depths, *(["aux"] if self.has_routers else []))

    @property
    def local_names(self) -> frozenset[str]:
        """The balance loss: head and prediction return the loss of all ranks' tokens."""
        return frozenset({"aux"})

    def counts(self, batch: Batch) -> Float[Tensor, " terms"]:
        """Return the weight of each term's targets, their number where all count 1.

        The balance loss counts every position in a document, with or without a target.
        """
        further = [(depth.labels, depth.loss_weight) for depth in batch.ahead]
        assert len(further) == self.num_depths, (len(further), self.num_depths)
        targets = [(batch.labels, batch.loss_weight), *further]
        counts = [total_weight(labels, weights) for labels, weights in targets]
        counts += [batch.num_tokens] if self.has_routers else []
        return torch.tensor(counts, dtype=torch.float64)

    def sums(
        self,
        model: HybridLM,
        hidden: Float[Tensor, "B T D"] | None,
        batch: Batch,
        routing: list[RoutingStats],
    ) -> Float[Tensor, " terms"]:
        """Return sums of nats; the balance loss is summed over tokens and layers.

        Source of the multi-token-prediction term: NVIDIA/Megatron-LM:
        megatron/core/transformer/multi_token_prediction.py, process_mtp_loss.
        """
        trunk_calls = len(routing)
        zero = torch.zeros((), device=batch.labels.device)
        terms = [zero] * (1 + self.num_depths)
        if hidden is not None:
            main = model.lm_head.loss(hidden, batch.labels, batch.loss_weight)
            terms = [main, *self._ahead(model, hidden, batch, routing)]
        if self.has_routers:
            aux = zero
            for index, stats in enumerate(routing):
                # the shared block is called once per depth: its loss is averaged over depths
                aux = aux + stats.aux_loss_sum / (1 if index < trunk_calls else self.num_depths)
            terms.append(aux)
        return torch.stack(terms)

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

    def combine(
        self, sums: Float[Tensor, " terms"], counts: Float[Tensor, " terms"]
    ) -> Float[Tensor, ""]:
        """Return the mean of each term, weighted as the recipe says."""
        (main, count), *others = zip(sums.unbind(), counts.tolist(), strict=True)
        loss = main / max(count, 1)
        factors = [self.config.mtp_loss_factor / max(self.num_depths, 1)] * self.num_depths
        factors += [self.config.moe_aux_loss_coeff] if self.has_routers else []
        for factor, (term, count) in zip(factors, others, strict=True):
            loss = loss + factor * term / max(count, 1)
        return loss


def total_weight(labels: Tensor, weights: Tensor | None) -> float:
    """Return the sum of the weights of all labels that count."""
    counted = labels != NO_LABEL
    return int(counted.sum()) if weights is None else float(weights[counted].double().sum())


def compute_sums(
    objective: Objective, model: HybridLM, batch: Batch
) -> tuple[Float[Tensor, " terms"], list[RoutingStats]]:
    """Run a model on a micro-batch; returns the terms, and the statistics of its routers."""
    routing: list[RoutingStats] = []
    hidden = model(batch.input_ids, batch.seq_idx, routing=routing, padding=batch.padding)
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
        """Return each term per count; a term that counts nothing is left out."""
        terms = zip(self._names, self.terms.tolist(), counts.tolist(), strict=True)
        return {f"loss/{name}": total / count for name, total, count in terms if count}
