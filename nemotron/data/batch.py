"""What the model is trained on in one step."""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

NO_LABEL = -100
"""Label of a position without a target, as in `torch.nn.functional.cross_entropy`."""


@dataclass
class Batch:
    """Rows of tokens with the token that follows each.

    `labels[b, t]` is the token after `input_ids[b, t]`, or `NO_LABEL`. `seq_idx` numbers the
    documents of a row from 0; a number is never used again in its row; without it the row is one
    document. `loss_weight` is absent when every label counts the same.
    """

    input_ids: Int[Tensor, "B T"]
    labels: Int[Tensor, "B T"]
    seq_idx: Int[Tensor, "B T"] | None
    loss_weight: Float[Tensor, "B T"] | None = None

    @property
    def num_loss_tokens(self) -> int:
        """Labels that count; ask before the batch is moved to a GPU, which would have to wait."""
        return int((self.labels != NO_LABEL).sum())

    def split(self, micro_batch: int) -> Iterator[Self]:
        """Yield the rows in order, `micro_batch` at a time, without copying."""
        for start in range(0, self.input_ids.shape[0], micro_batch):
            yield self._map(operator.itemgetter(slice(start, start + micro_batch)))

    def to(self, device: torch.device | str) -> Self:
        """Return the batch on another device."""
        return self._map(operator.methodcaller("to", device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return replace(
            self,
            input_ids=function(self.input_ids),
            labels=function(self.labels),
            seq_idx=None if self.seq_idx is None else function(self.seq_idx),
            loss_weight=None if self.loss_weight is None else function(self.loss_weight),
        )
