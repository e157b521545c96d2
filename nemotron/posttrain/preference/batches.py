"""Rows of pairs of answers, each label with its log-probability for the reference."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nemotron.data.batch import NO_LABEL, PLACES, Batch, Batches
from nemotron.data.loader import TrainingData, rows_of_rank
from nemotron.posttrain.contents import KEY, Contents, check_contents
from nemotron.posttrain.preference.objective import REFERENCE
from nemotron.posttrain.preference.references import References


class PreferenceBatches:
    """Another source's batches, with what the reference says of their labels."""

    def __init__(
        self,
        batches: Batches,
        data: TrainingData,
        references: References,
        contents: Contents,
        *,
        reader: int,
        num_readers: int,
    ) -> None:
        """`reader` of `num_readers` is the one whose rows `batches` takes."""
        self._batches, self._data, self._references = batches, data, references
        self._contents = contents
        self._reader, self._num_readers = reader, num_readers

    def take(self, step: int) -> Batch:
        """Return the rows of a step."""
        batch = self._batches.take(step)
        own = rows_of_rank(self._data.num_rows(step), self._reader, self._num_readers)
        stored = self._references.train
        values = [stored[s.source, s.seq_len].values for s in self._data.sample_ids(step, own)]
        return with_reference(batch, values)

    def state(self) -> dict[str, Any]:  # Any: nested JSON
        """Return the state of the other source, and what identifies the reference."""
        return {**self._batches.state(), KEY: self._contents}

    def restore(self, saved: Mapping[str, Any], step: int) -> None:
        """Restore the other source.

        Raises:
            UserError: as it does, and when the reference has changed.
        """
        check_contents(saved, self._contents, step)
        self._batches.restore({k: v for k, v in saved.items() if k != KEY}, step)

    def metrics(self, step: int) -> dict[str, float]:
        """Return the figures of the other source."""
        return self._batches.metrics(step)


def with_reference(batch: Batch, values: Sequence[NDArray[np.float32]]) -> Batch:
    """Return a batch with the log-probabilities of its labels; `values` has those of each row."""
    found = np.zeros(batch.labels.shape, np.float32)
    is_label = (batch.labels != NO_LABEL).numpy()
    for row, known in enumerate(values):
        found[row, is_label[row]] = known[batch.extras[PLACES][row, is_label[row]].numpy()]
    extras = {name: tensor for name, tensor in batch.extras.items() if name != PLACES}
    return replace(batch, extras={**extras, REFERENCE: torch.from_numpy(found)})
