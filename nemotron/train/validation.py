"""Validation: loss, perplexity and bits per byte, for each domain and over all of them."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from nemotron.data.batch import NO_LABEL, Batch
from nemotron.data.loader import TrainingData, ValidationBatch
from nemotron.model.hybrid import HybridLM
from nemotron.model.router import RoutingStats
from nemotron.parallel.local import LocalModel
from nemotron.parallel.runtime import Ranks
from nemotron.train.reliability.progress import StepProgress


@dataclass(frozen=True)
class Sums:
    """Nats lost on held-out text, the tokens predicted, and the bytes that they stand for."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)

    def add_up(self, ranks: Ranks, device: torch.device) -> "Sums":
        """Add up over all ranks."""
        values = torch.tensor([self.nats, self.tokens, self.bytes], dtype=torch.float64)
        nats, tokens, num_bytes = ranks.sum(values.to(device)).tolist()
        return Sums(nats, int(tokens), int(num_bytes))

    def metrics(self, name: str) -> dict[str, float]:
        """Return the derived values; absent where there is nothing to divide by."""
        values = {}
        if self.tokens:
            loss = self.nats / self.tokens
            values[f"{name}/loss"] = loss
            values[f"{name}/perplexity"] = math.exp(min(loss, 700.0))
        if self.bytes:
            # comparable between tokenizers, unlike the loss per token
            values[f"{name}/bits_per_byte"] = self.nats / (math.log(2) * self.bytes)
        return values


@torch.no_grad()
def evaluate(
    local: LocalModel,
    data: TrainingData,
    ranks: Ranks,
    *,
    tokens: int,
    rows: int,
    progress: StepProgress | None = None,
) -> dict[str, float]:
    """Return the metrics of all domains; the same rows every time, `rows` of them at once."""
    progress = progress or StepProgress()
    total = Sums()
    values: dict[str, float] = {}
    for domain in data.validation_domains:
        sums = Sums()
        for held_out in own_batches(data.validation(domain, tokens=tokens, rows=rows), local, rows):
            progress.move()
            batch = held_out.batch
            batch = batch if data.config.reset_documents else replace(batch, seq_idx=None)
            nats = _loss_sum(local, batch)
            if local.counts_rows:
                sums += Sums(0.0, batch.num_loss_tokens, held_out.num_bytes)
            if local.counts_loss:
                sums += Sums(nats)
        sums = sums.add_up(ranks, local.device)
        values |= sums.metrics(f"validation/{domain}")
        total += sums
    local.drop_gathered()
    return total.metrics("validation") | values


def _loss_sum(local: LocalModel, batch: Batch) -> float:
    """Return the summed loss of the next token, the share of this rank."""
    batch = local.share_rows(batch).to(local.device)
    if local.pipeline is not None:
        return sum(loss.item() for loss in local.pipeline.evaluate([batch], _next_token_loss))
    [model] = local.models
    hidden = model(batch.input_ids, batch.seq_idx)
    return model.lm_head.loss(hidden, batch.labels).item()


def _next_token_loss(
    model: HybridLM, hidden: Tensor | None, batch: Batch, routing: list[RoutingStats]
) -> Tensor:
    if hidden is None:
        return torch.zeros((), device=batch.labels.device)
    return model.lm_head.loss(hidden, batch.labels)


def own_batches(
    batches: Iterator[ValidationBatch], local: LocalModel, rows: int
) -> Iterator[ValidationBatch]:
    """Yield this rank's batches of held-out rows, as many on every rank and of one size.

    Some rows are then blank: they have no labels.
    """
    if local.mesh is None:
        yield from batches
        return
    ranks = local.mesh.dims.batch
    while round_ := list(itertools.islice(batches, ranks)):
        own = round_[min(local.batch_rank, len(round_) - 1)]
        is_blank = local.batch_rank >= len(round_)
        missing = rows - own.batch.input_ids.shape[0]
        batch = own.batch.map(partial(_add_rows, number=missing))
        batch.labels[0 if is_blank else rows - missing :] = NO_LABEL
        yield ValidationBatch(batch, 0 if is_blank else own.num_bytes)


def _add_rows(values: Tensor, number: int) -> Tensor:
    return torch.cat([values, values[:1].expand(number, *values.shape[1:])])
