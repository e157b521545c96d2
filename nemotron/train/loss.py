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
    """How many targets each term has; of a whole step, these are the denominators."""

    main: int
    mtp: tuple[int, ...]
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
    mtp = tuple(int((labels != NO_LABEL).sum()) for labels in _depth_labels(batch, depths))
    return TokenCounts(int((batch.labels != NO_LABEL).sum()), mtp, batch.labels.numel())


def losses(model: HybridLM, batch: Batch, config: LossConfig) -> LossTerms:
    """Run the model on a micro-batch and return every loss term as a sum.

    Source of the multi-token-prediction term: NVIDIA/Megatron-LM:
    megatron/core/transformer/multi_token_prediction.py, process_mtp_loss.
    """
    routing: list[RoutingStats] = []
    hidden = model(batch.input_ids, batch.seq_idx, routing=routing)
    head: Tensor = model.lm_head.weight
    main = linear_cross_entropy(hidden.flatten(0, 1), head, batch.labels.flatten())

    depths = num_depths(model, config)
    trunk_calls = len(routing)
    mtp = []
    if depths:
        further = model.mtp_hidden(
            hidden, batch.input_ids, batch.seq_idx, depths, config.mtp_detach_heads, routing
        )
        if config.mtp_detach_heads:
            head = head.detach()
        for depth_hidden, labels in zip(further, _depth_labels(batch, depths), strict=True):
            mtp.append(linear_cross_entropy(depth_hidden.flatten(0, 1), head, labels.flatten()))

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


def _depth_labels(batch: Batch, depths: int) -> list[Int[Tensor, "B T"]]:
    labels, results = batch.labels, []
    for _ in range(depths):
        labels = shift_left(labels, batch.seq_idx, vacated=NO_LABEL)
        results.append(labels)
    return results
