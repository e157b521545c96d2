"""What the model is trained on in one step."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
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
    documents of a row from 0; a number is never used again in its row. `loss_weight` is absent
    when every label counts the same.
    """

    input_ids: Int[Tensor, "B T"]
    labels: Int[Tensor, "B T"]
    seq_idx: Int[Tensor, "B T"]
    loss_weight: Float[Tensor, "B T"] | None = None

    @property
    def num_loss_tokens(self) -> int:
        """Labels that count; ask before the batch is moved to a GPU, which would have to wait."""
        return int((self.labels != NO_LABEL).sum())

    def split(self, micro_batch: int) -> Iterator[Self]:
        """Yield the rows in order, `micro_batch` at a time, without copying."""
        for start in range(0, self.input_ids.shape[0], micro_batch):
            yield self._map(lambda tensor, start=start: tensor[start : start + micro_batch])

    def to(self, device: torch.device | str) -> Self:
        """Return the batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, function) -> Self:
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return type(self)(**{n: None if t is None else function(t) for n, t in tensors.items()})
