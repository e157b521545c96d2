"""An objective and a batch source that have nothing of pre-training."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nemotron.data.batch import NO_LABEL, Batch
from nemotron.errors import UserError
from nemotron.model.hybrid import HybridLM
from nemotron.model.router import RoutingStats

TEMPERATURE = 0.8


class EverySecondToken:
    """Weighted log-probability of every second token, and the square of those of the others."""

    names = ("chosen", "others")
    local_names = frozenset[str]()

    def counts(self, batch: Batch) -> Tensor:
        return torch.stack([part.sum(dtype=torch.float64) for part in self._parts(batch)])

    def sums(
        self, model: HybridLM, hidden: Tensor | None, batch: Batch, routing: list[RoutingStats]
    ) -> Tensor:
        if hidden is None:
            return torch.zeros(2, device=batch.labels.device)
        logprobs = model.lm_head.token_logprobs(hidden, batch.labels, TEMPERATURE)
        chosen, others = self._parts(batch)
        weighted = -logprobs * batch.extras["weight"]
        return torch.stack([(weighted * chosen).sum(), (logprobs.square() * others).sum()])

    def combine(self, sums: Tensor, counts: Tensor) -> Tensor:
        chosen, others = counts.tolist()
        return sums[0] / max(chosen, 1) + 0.01 * sums[1] / max(others, 1)

    def _parts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        has_label, is_chosen = batch.labels != NO_LABEL, batch.extras["place"] % 2 == 0
        return has_label & is_chosen, has_label & ~is_chosen


class CountedBatches:
    """Rows made in memory; which ones is said by a counter, not by the step."""

    def __init__(
        self, rows: int, length: int, vocab_size: int, *, reader: int = 0, num_readers: int = 1
    ) -> None:
        self._shape, self._vocab_size = (rows, length), vocab_size
        share = rows // num_readers
        self._own = slice(reader * share, (reader + 1) * share)
        self.taken = 0

    def take(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(self.taken)
        self.taken += 1
        rows, length = self._shape
        # what is to be learned: every token is one more than that before it
        first = torch.randint(self._vocab_size, (rows, 1), generator=generator)
        tokens = (first + torch.arange(length + 1)) % self._vocab_size
        labels = tokens[:, 1:].masked_fill(
            torch.rand(rows, length, generator=generator) < 0.1, NO_LABEL
        )
        weight = 0.5 + torch.rand(rows, length, generator=generator)
        place = torch.arange(length).expand(rows, -1)
        extras = {"weight": weight, "place": place}
        return Batch(tokens[:, :-1], labels, None, extras=extras).map(lambda t: t[self._own])

    def state(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def restore(self, saved: Mapping[str, Any], step: int) -> None:
        if saved.keys() != {"taken"}:
            raise UserError(f"the checkpoint of step {step} has other batches than counted ones.")
        self.taken = saved["taken"]

    def metrics(self, step: int) -> dict[str, float]:
        return {"data/taken": self.taken}
