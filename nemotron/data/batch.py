"""What the model is trained on in one step."""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from numpy.typing import NDArray
from torch import Tensor

NO_LABEL = -100
"""Label of a position without a target, as in `torch.nn.functional.cross_entropy`."""

PLACES = "places"
"""Name in `Batch.extras`: the place of each label in the stream of its source, where rows have it;
-1 without a label."""


@dataclass
class Batch:
    """Rows of tokens with the token that follows each.

    `labels[b, t]` is the token after `input_ids[b, t]`, or `NO_LABEL`. `seq_idx` numbers the
    documents of a row from 0; a number is never used again in its row; without it the row is one
    document. `loss_weight` weighs the loss of each label; without it every label counts 1.
    `ahead` holds what `look_ahead` found; it is found before ranks share the tokens of a row.
    `extras` holds what else an objective needs to know about each label, by name. `padding` is true
    outside of all documents; without it there are no such positions. `candidates` are what a model
    of several candidates reads at each place, the first of which `input_ids` repeats. `languages`
    numbers the language of each token, -1 where it is not known; with `languages_decide` they
    choose the experts of a model that has some for each language. `experts` (int16) are those that
    each token went to when it was written, for every mixture layer of the backbone; -1 leaves a
    token to the routers.
    """

    input_ids: Int[Tensor, "B T"]
    labels: Int[Tensor, "B T"]
    seq_idx: Int[Tensor, "B T"] | None
    loss_weight: Float[Tensor, "B T"] | None = None
    ahead: "tuple[Ahead, ...]" = ()
    extras: dict[str, Shaped[Tensor, "B T *rest"]] = field(default_factory=dict)
    padding: Bool[Tensor, "B T"] | None = None
    candidates: Int[Tensor, "B T K"] | None = None
    languages: Int[Tensor, "B T"] | None = None
    languages_decide: bool = False
    experts: Int[Tensor, "B T layers K"] | None = None

    @property
    def num_tokens(self) -> int:
        """Positions inside documents; ask before the batch is moved to a GPU."""
        outside = 0 if self.padding is None else int(self.padding.sum())
        return self.labels.numel() - outside

    @property
    def num_loss_tokens(self) -> int:
        """Labels that count; ask before the batch is moved to a GPU, which would have to wait."""
        return int((self.labels != NO_LABEL).sum())

    def split(self, micro_batch: int) -> "Iterator[Batch]":
        """Yield the rows in order, `micro_batch` at a time, without copying."""
        for start in range(0, self.input_ids.shape[0], micro_batch):
            yield self.map(operator.itemgetter(slice(start, start + micro_batch)))

    def look_ahead(self, num_depths: int) -> "Batch":
        """Return the batch with inputs and targets for predicting 2, 3, … tokens ahead."""
        input_ids, labels, weight = self.input_ids, self.labels, self.loss_weight
        ahead = []
        for _ in range(num_depths):
            input_ids = shift_left(input_ids, self.seq_idx, vacated=0)
            labels = shift_left(labels, self.seq_idx, vacated=NO_LABEL)
            weight = None if weight is None else shift_left(weight, self.seq_idx, vacated=0)
            ahead.append(Ahead(input_ids, labels, weight))
        return replace(self, ahead=tuple(ahead))

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on another device; copies from pinned memory overlap with work."""
        return self.map(operator.methodcaller("to", device, non_blocking=True))

    def pin(self) -> "Batch":
        """Return the batch in memory from which a GPU copies without waiting."""
        return self.map(operator.methodcaller("pin_memory"))

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Return the batch with the function applied to every tensor of [B, T] or [B, T, …]."""
        return replace(
            self,
            input_ids=function(self.input_ids),
            labels=function(self.labels),
            seq_idx=None if self.seq_idx is None else function(self.seq_idx),
            loss_weight=None if self.loss_weight is None else function(self.loss_weight),
            ahead=tuple(depth.map(function) for depth in self.ahead),
            extras={name: function(values) for name, values in self.extras.items()},
            padding=None if self.padding is None else function(self.padding),
            candidates=None if self.candidates is None else function(self.candidates),
            languages=None if self.languages is None else function(self.languages),
            experts=None if self.experts is None else function(self.experts),
        )


@dataclass(frozen=True)
class Ahead:
    """Inputs and targets of one depth of multi-token prediction, lined up with the batch's."""

    input_ids: Int[Tensor, "B T"]
    """The tokens so many places further in their document; 0 beyond its end."""
    labels: Int[Tensor, "B T"]
    loss_weight: Float[Tensor, "B T"] | None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Ahead":
        """Apply a function to every tensor."""
        weight = None if self.loss_weight is None else function(self.loss_weight)
        return replace(
            self,
            input_ids=function(self.input_ids),
            labels=function(self.labels),
            loss_weight=weight,
        )


def shift_left(
    values: Shaped[Tensor, "B T"], seq_idx: Int[Tensor, "B T"] | None, vacated: int
) -> Shaped[Tensor, "B T"]:
    """Move each token one place towards the start of its document; the last place is `vacated`."""
    shifted = F.pad(values[:, 1:], (0, 1), value=vacated)
    if seq_idx is None:
        return shifted
    same_document = F.pad(seq_idx[:, 1:] == seq_idx[:, :-1], (0, 1))
    return shifted.masked_fill(~same_document, vacated)


class Batches(Protocol):
    """A source of batches: rows of text, answers of the model itself, or anything else."""

    def take(self, step: int) -> Batch:
        """Return this rank's rows of the optimizer step with this index.

        Steps are taken in order, except after `restore`, and where a run passes over some.
        """
        ...

    def state(self) -> dict[str, Any]:  # Any: nested JSON
        """Return what a checkpoint must hold to continue after the last step that was taken."""
        ...

    def restore(self, saved: Mapping[str, Any], step: int) -> None:
        """Go on from the `state` of a checkpoint after so many steps.

        Raises:
            UserError: when this source cannot, because something else was read before.
        """
        ...

    def metrics(self, step: int) -> dict[str, float]:
        """Return what to log about the steps before this index."""
        ...


@dataclass(frozen=True)
class Row:
    """The tokens of one row, one more than it has inputs, or fewer.

    `starts` are the places at which a document begins, for rows of whole documents; without them
    the token after an end of document begins the next one. `weights` weighs the prediction of each
    token; 0 makes it none at all. `places` are those of the tokens in the stream of their source;
    with them, something can be stored about each token.
    """

    tokens: NDArray[np.int64]
    starts: NDArray[np.int64] | None = None
    weights: NDArray[np.float32] | None = None
    places: NDArray[np.int64] | None = None


def pack(rows: Sequence[Row], seq_len: int, eod_id: int, *, mask_eod_loss: bool) -> Batch:
    """Make a batch of rows with `seq_len` inputs.

    A shorter row is filled up with ends of documents that have no label. In rows of whole
    documents the first token of a document is not a label.
    """
    tokens = np.full((len(rows), seq_len + 1), eod_id, np.int64)
    labels = np.full((len(rows), seq_len), NO_LABEL, np.int64)
    seq_idx = np.zeros((len(rows), seq_len), np.int32)
    weights = np.zeros((len(rows), seq_len), np.float32)
    lengths = np.asarray([len(row.tokens) for row in rows])
    padding = np.arange(seq_len) >= lengths[:, None]
    for number, row in enumerate(rows):
        length = len(row.tokens)
        tokens[number, :length] = row.tokens
        labels[number, : length - 1] = row.tokens[1:]
        inputs = tokens[number, :-1]
        if row.starts is None:
            ends = inputs == eod_id
            if mask_eod_loss:
                labels[number, ends] = NO_LABEL
            seq_idx[number] = np.cumsum(ends) - ends
        else:
            begins = np.zeros(seq_len + 1, np.int32)
            begins[[*row.starts, *([length] if length <= seq_len else [])]] = 1
            seq_idx[number] = np.cumsum(begins)[:-1] - 1
            labels[number, begins[1:] == 1] = NO_LABEL
        weights[number, : length - 1] = 1.0 if row.weights is None else row.weights[1:]
    labels[weights == 0] = NO_LABEL
    extras = {} if rows[0].places is None else {PLACES: _places(rows, labels)}
    weighted = np.any((weights != 1) & (labels != NO_LABEL))
    return Batch(
        input_ids=torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])),
        labels=torch.from_numpy(labels),
        seq_idx=torch.from_numpy(seq_idx),
        loss_weight=torch.from_numpy(weights) if weighted else None,
        extras=extras,
        padding=torch.from_numpy(padding) if padding.any() else None,
    )


def _places(rows: Sequence[Row], labels: NDArray[np.int64]) -> Int[Tensor, "B T"]:
    places = np.full(labels.shape, -1, np.int64)
    for own, row in zip(places, rows, strict=True):
        assert row.places is not None
        own[: len(row.places) - 1] = row.places[1:]
    return torch.from_numpy(np.where(labels == NO_LABEL, -1, places))
