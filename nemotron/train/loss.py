"""The loss terms of one micro-batch, as sums; the one place that divides is `objective`."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.data.batch import NO_LABEL, Batch
from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM
from nemotron.model.router import RoutingStats
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


def _targets(batch: Batch) -> list[tuple[Tensor, Tensor | None]]:
    """Return labels and weights of the next token and of each depth beyond it."""
    further = [(depth.labels, depth.loss_weight) for depth in batch.ahead]
    return [(batch.labels, batch.loss_weight), *further]


def _total_weight(labels: Tensor, weights: Tensor | None) -> float:
    counted = labels != NO_LABEL
    return int(counted.sum()) if weights is None else float(weights[counted].double().sum())
