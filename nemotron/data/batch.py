"""What the model is trained on in one step."""

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

NO_LABEL = -100
"""Label of a position without a target, as in `torch.nn.functional.cross_entropy`."""


@dataclass
class Batch:
    """Rows of tokens with the token that follows each.

    `labels[b, t]` is the token after `input_ids[b, t]`, or `NO_LABEL`. `seq_idx` numbers the
    documents of a row from 0; a number is never used again in its row; without it the row is one
    document.
    """

    input_ids: Int[Tensor, "B T"]
    labels: Int[Tensor, "B T"]
    seq_idx: Int[Tensor, "B T"] | None

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
        )


def pack(
    windows: Sequence[NDArray[np.int64]], seq_len: int, eod_id: int, *, mask_eod_loss: bool
) -> Batch:
    """Make rows of `seq_len` tokens from windows of up to one token more.

    The token after an end-of-document starts the next document of the row. A shorter window is
    filled up with ends of documents that have no label.
    """
    tokens = np.full((len(windows), seq_len + 1), eod_id, np.int64)
    labels = np.full((len(windows), seq_len), NO_LABEL, np.int64)
    for row, window in enumerate(windows):
        tokens[row, : len(window)] = window
        labels[row, : len(window) - 1] = window[1:]
    inputs = tokens[:, :-1]
    ends = inputs == eod_id
    if mask_eod_loss:
        labels[ends] = NO_LABEL
    seq_idx = np.cumsum(ends, axis=1) - ends
    return Batch(
        input_ids=torch.from_numpy(np.ascontiguousarray(inputs)),
        labels=torch.from_numpy(labels),
        seq_idx=torch.from_numpy(seq_idx.astype(np.int32)),
    )
