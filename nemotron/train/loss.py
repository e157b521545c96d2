"""The loss terms of a micro-batch and of a step, as sums; only `objective` divides."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.data.batch import NO_LABEL, Batch
from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM
from nemotron.model.router import RoutingStats
from nemotron.parallel.runtime import Ranks
from nemotron.train.config import LossConfig


@dataclass(frozen=True)
class TokenCounts:
    """The weight of each term's targets, their number where all count 1.

    Of a whole step, these are the denominators.
    """

    main: float
    mtp: tuple[float, ...]
    tokens: int
    """Positions, with or without a target: the router's balance loss counts them all."""


@dataclass(frozen=True)
class LossTerms:
    """Sums of nats over a micro-batch, with gradients; `aux` is summed over tokens and layers."""

    main: Float[Tensor, ""]
    mtp: tuple[Float[Tensor, ""], ...]
    aux: Float[Tensor, ""]
    routing: list[RoutingStats]


def num_depths(model: ModelConfig, config: LossConfig) -> int:
    """Return how many multi-token-prediction depths are trained: 0 without such a block."""
    return config.mtp_num_depths if model.mtp_pattern else 0


def count_tokens(batch: Batch) -> TokenCounts:
    """Count the targets of every term from the labels alone, before any forward pass."""
    main, *mtp = (_total_weight(*targets) for targets in _targets(batch))
    return TokenCounts(main, tuple(mtp), batch.labels.numel())


def losses(model: HybridLM, batch: Batch, config: LossConfig) -> LossTerms:
    """Run the model on a micro-batch and return every loss term as a sum.

    The depths of multi-token prediction are those of `batch.ahead`.
    """
    routing: list[RoutingStats] = []
    hidden = model(batch.input_ids, batch.seq_idx, routing=routing)
    return stage_losses(model, hidden, batch, config, routing)


def stage_losses(
    model: HybridLM,
    hidden: Float[Tensor, "B T D"] | None,
    batch: Batch,
    config: LossConfig,
    routing: list[RoutingStats],
) -> LossTerms:
    """Return the loss terms, given the trunk's hidden states and the statistics of its routers.

    A stage of a pipeline that has no head has no hidden states here, and only the last term.
    Source of the multi-token-prediction term: NVIDIA/Megatron-LM:
    megatron/core/transformer/multi_token_prediction.py, process_mtp_loss.
    """
    zero = torch.zeros((), device=batch.labels.device)
    trunk_calls, depths = len(routing), len(batch.ahead)
    main, mtp = zero, [zero] * depths
    if hidden is not None:
        main = model.lm_head.loss(hidden, batch.labels, batch.loss_weight)
        if depths:
            mtp = _losses_ahead(model, hidden, batch, config.mtp_detach_heads, routing)
    aux = zero
    for index, stats in enumerate(routing):
        # the shared block is called once per depth, so its balance loss is averaged over depths
        aux = aux + stats.aux_loss_sum / (1 if index < trunk_calls else depths)
    return LossTerms(main, tuple(mtp), aux, routing)


def _losses_ahead(
    model: HybridLM, hidden: Tensor, batch: Batch, detach: bool, routing: list[RoutingStats]
) -> list[Tensor]:
    inputs = [depth.input_ids for depth in batch.ahead]
    further = model.mtp_hidden(hidden, inputs, batch.seq_idx, detach, routing)
    return [
        model.lm_head.loss(depth_hidden, depth.labels, depth.loss_weight, detach)
        for depth_hidden, depth in zip(further, batch.ahead, strict=True)
    ]


def objective(terms: LossTerms, counts: TokenCounts, config: LossConfig) -> Float[Tensor, ""]:
    """Divide the sums by the counts of the whole step and weigh them: what is differentiated.

    Added up over the micro-batches of a step, on any number of processes, this is the loss:
    main + factor / depths * sum of depths + coefficient * balance loss.
    """
    loss = terms.main / max(counts.main, 1)
    for term, count in zip(terms.mtp, counts.mtp, strict=True):
        loss = loss + config.mtp_loss_factor / len(terms.mtp) * term / max(count, 1)
    return loss + config.moe_aux_loss_coeff * terms.aux / max(counts.tokens, 1)


class StepSums:
    """Detached sums over the micro-batches so far, on the device."""

    def __init__(
        self, num_depths: int, layers: Sequence[str], num_experts: int, device: torch.device
    ) -> None:
        """Begin at zero; `layers` names the mixture layers of the whole model."""
        self.main = torch.zeros((), device=device)
        self.mtp = tuple(torch.zeros((), device=device) for _ in range(num_depths))
        self.aux = torch.zeros((), device=device)
        load = torch.zeros(len(layers), num_experts, dtype=torch.int64, device=device)
        self.load: dict[str, Tensor] = dict(zip(layers, load, strict=True))
        """Tokens per expert, by the name of the mixture layer."""
        self._all_load = load

    def add(self, terms: LossTerms) -> None:
        """Add one micro-batch."""
        self.main += terms.main.detach()
        self.aux += terms.aux.detach()
        for total, term in zip(self.mtp, terms.mtp, strict=True):
            total += term.detach()
        for stats in terms.routing:
            self.load[stats.name] += stats.counts

    def add_up(self, ranks: Ranks, others: Tensor, *, counts_loss: bool) -> Tensor:
        """Add up over all ranks in one exchange, together with a vector of others.

        `counts_loss` is false on all but one of the ranks that computed the same losses.
        """
        if not ranks.grouped:
            return others
        losses = torch.stack([self.main, *self.mtp])
        losses = losses if counts_loss else torch.zeros_like(losses)
        parts = [losses, self.aux.view(1), others, self._all_load.flatten()]
        total = ranks.sum(torch.cat([part.double() for part in parts]))
        losses, aux, others, load = total.split([part.numel() for part in parts])
        self.main, *mtp = losses.to(self.main.dtype).unbind()
        self.mtp, self.aux = tuple(mtp), aux[0].to(self.aux.dtype)
        self._all_load.copy_(load.view_as(self._all_load))
        return others

    def objective(self, counts: TokenCounts, config: LossConfig) -> Tensor:
        """Return the loss of the whole step, as it was differentiated."""
        return objective(LossTerms(self.main, self.mtp, self.aux, []), counts, config)

    def values(self, counts: TokenCounts) -> dict[str, float]:
        """Return each term per token; a term without targets is left out."""
        names = ["loss/main", *(f"loss/mtp_{depth}" for depth in range(1, len(self.mtp) + 1))]
        terms = zip(names, (self.main, *self.mtp), (counts.main, *counts.mtp), strict=True)
        values = {name: total.item() / count for name, total, count in terms if count}
        if self.load:
            values["loss/aux"] = self.aux.item() / counts.tokens
        return values


def _targets(batch: Batch) -> list[tuple[Tensor, Tensor | None]]:
    """Return labels and weights of the next token and of each depth beyond it."""
    further = [(depth.labels, depth.loss_weight) for depth in batch.ahead]
    return [(batch.labels, batch.loss_weight), *further]


def _total_weight(labels: Tensor, weights: Tensor | None) -> float:
    counted = labels != NO_LABEL
    return int(counted.sum()) if weights is None else float(weights[counted].double().sum())
