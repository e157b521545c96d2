"""The loss terms of one micro-batch, as sums; the one place that divides is `objective`."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.data.batch import NO_LABEL, Batch
from nemotron.model.hybrid import HybridLM
from nemotron.model.mtp import shift_left
from nemotron.model.router import RoutingStats
from nemotron.ops.linear_cross_entropy import linear_cross_entropy
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


def num_depths(model: HybridLM, config: LossConfig) -> int:
    """Return how many multi-token-prediction depths are trained: 0 without such a block."""
    return config.mtp_num_depths if model.mtp is not None else 0


def count_tokens(batch: Batch, depths: int) -> TokenCounts:
    """Count the targets of every term from the labels alone, before any forward pass."""
    main, *mtp = (_total_weight(*targets) for targets in _targets(batch, depths))
    return TokenCounts(main, tuple(mtp), batch.labels.numel())


def losses(model: HybridLM, batch: Batch, config: LossConfig) -> LossTerms:
    """Run the model on a micro-batch and return every loss term as a sum.

    Source of the multi-token-prediction term: NVIDIA/Megatron-LM:
    megatron/core/transformer/multi_token_prediction.py, process_mtp_loss.
    """
    routing: list[RoutingStats] = []
    hidden = model(batch.input_ids, batch.seq_idx, routing=routing)
    head: Tensor = model.lm_head.weight
    depths = num_depths(model, config)
    (labels, weights), *further_targets = _targets(batch, depths)
    main = linear_cross_entropy(hidden.flatten(0, 1), head, labels, weights)

    trunk_calls = len(routing)
    mtp = []
    if depths:
        further = model.mtp_hidden(
            hidden, batch.input_ids, batch.seq_idx, depths, config.mtp_detach_heads, routing
        )
        if config.mtp_detach_heads:
            head = head.detach()
        for depth_hidden, (labels, weights) in zip(further, further_targets, strict=True):
            mtp.append(linear_cross_entropy(depth_hidden.flatten(0, 1), head, labels, weights))

    aux = torch.zeros((), device=hidden.device)
    for index, stats in enumerate(routing):
        # the shared block is called once per depth, so its balance loss is averaged over depths
        aux = aux + stats.aux_loss_sum / (1 if index < trunk_calls else depths)
    return LossTerms(main, tuple(mtp), aux, routing)


def objective(terms: LossTerms, counts: TokenCounts, config: LossConfig) -> Float[Tensor, ""]:
    """Divide the sums by the counts of the whole step and weigh them: what is differentiated.

    Added up over the micro-batches of a step, on any number of processes, this is the loss:
    main + factor / depths * sum of depths + coefficient * balance loss.
    """
    loss = terms.main / max(counts.main, 1)
    for term, count in zip(terms.mtp, counts.mtp, strict=True):
        loss = loss + config.mtp_loss_factor / len(terms.mtp) * term / max(count, 1)
    return loss + config.moe_aux_loss_coeff * terms.aux / max(counts.tokens, 1)


Targets = tuple[Int[Tensor, " M"], Float[Tensor, " M"] | None]
"""Labels and the weight of each; without weights every label counts 1."""


def _targets(batch: Batch, depths: int) -> list[Targets]:
    """Return the targets of the next token and of each depth beyond it."""
    labels, weights = batch.labels, batch.loss_weight
    results: list[Targets] = [(labels.flatten(), None if weights is None else weights.flatten())]
    for _ in range(depths):
        labels = shift_left(labels, batch.seq_idx, vacated=NO_LABEL)
        if weights is not None:
            weights = shift_left(weights, batch.seq_idx, vacated=0)
        results.append((labels.flatten(), None if weights is None else weights.flatten()))
    return results


def _total_weight(labels: Tensor, weights: Tensor | None) -> float:
    counted = labels != NO_LABEL
    return int(counted.sum()) if weights is None else float(weights[counted].double().sum())
