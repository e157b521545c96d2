"""The batches of text of one reader, read while the steps before them are computed."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from nemotron.data.batch import Batch
from nemotron.data.config import DataConfig
from nemotron.data.loader import TrainingData, rows_of_rank

SOURCES_LOGGED = 64
"""Sources up to which the tokens read from each are logged."""


class Prefetcher:
    """Answers for one step after the other, reading `depth` steps ahead in a thread of its own.

    Reading lets other threads run, because most of it is copying out of mapped files. There is
    nothing to save: asked for any step, it goes on from there.
    """

    def __init__(
        self, read: Callable[[int], Batch], *, depth: int, num_steps: int, pin: bool
    ) -> None:
        """Take what reads a step; no step from `num_steps` on is read ahead."""
        self._read, self._depth, self._num_steps, self._pin = read, depth, num_steps, pin
        self._pool = ThreadPoolExecutor(1, "rows") if depth else None
        self._ahead: deque[tuple[int, Future[Batch]]] = deque()

    def take(self, step: int) -> Batch:
        """Return the rows of a step; whatever was wrong with reading them is raised here."""
        if self._pool is None:
            return self._load(step)
        while self._ahead and self._ahead[0][0] != step:
            self._ahead.popleft()[1].cancel()
        first = self._ahead[-1][0] + 1 if self._ahead else step
        last = max(step + 1, min(step + 1 + self._depth, self._num_steps))
        for number in range(first, last):
            self._ahead.append((number, self._pool.submit(self._load, number)))
        return self._ahead.popleft()[1].result()

    def _load(self, step: int) -> Batch:
        batch = self._read(step)
        return batch.pin() if self._pin else batch


class Languages(Protocol):
    """What says which language tokens are."""

    def label(self, batch: Batch, sources: Sequence[str], step: int) -> Batch:
        """Return the batch with the language of each token, given the source of each row."""
        ...


@dataclass(frozen=True)
class ScriptLanguages:
    """The language of each token by its id; -1 where it is not known."""

    numbers: Int[Tensor, " V"]
    oracle_steps: int = 0
    """First steps in which the languages choose the experts."""

    def label(self, batch: Batch, sources: Sequence[str], step: int) -> Batch:
        """Return the batch with the language of each token."""
        labels = self.numbers[batch.input_ids]
        return replace(batch, languages=labels, languages_decide=step < self.oracle_steps)


@dataclass(frozen=True)
class SourceLanguages:
    """The language of each source, by its number; -1 for a mixed one."""

    numbers: Mapping[str, int]
    oracle_steps: int = 0
    """First steps in which the languages choose the experts."""

    def label(self, batch: Batch, sources: Sequence[str], step: int) -> Batch:
        """Return the batch with the language of each row, given the source of each."""
        numbers = torch.tensor([self.numbers[name] for name in sources])
        labels = numbers.unsqueeze(1).expand_as(batch.input_ids).contiguous()
        return replace(batch, languages=labels, languages_decide=step < self.oracle_steps)


class TextBatches:
    """A batch source: the rows of each step that one reader of several reads, with their targets.

    Rows are a function of the step, so a checkpoint only needs to know that the text is the same.
    """

    def __init__(
        self,
        config: DataConfig,
        data: TrainingData,
        *,
        reader: int,
        num_readers: int,
        num_steps: int,
        num_depths: int,
        pin: bool,
        languages: Languages | None = None,
    ) -> None:
        """Read targets for `num_depths` tokens beyond the next, and no step from `num_steps` on."""
        self._languages = languages
        self._config, self._data, self._depths = config, data, num_depths
        self._reader, self._num_readers = reader, num_readers
        self._ahead = Prefetcher(
            self._read, depth=config.prefetch_steps, num_steps=num_steps, pin=pin
        )

    def take(self, step: int) -> Batch:
        """Return the rows of a step; whatever was wrong with reading them is raised here."""
        return self._ahead.take(step)

    def state(self) -> dict[str, Any]:  # Any: nested JSON
        """Return what identifies the text and its order."""
        return self._data.fingerprint()

    def restore(self, saved: Mapping[str, Any], step: int) -> None:
        """Check that the steps before this one read the same text in the same order.

        Raises:
            UserError: when they did not, naming the file or the setting that differs.
        """
        self._data.check_fingerprint(saved, step)

    def metrics(self, step: int) -> dict[str, float]:
        """Return the tokens of each source in the steps before this one."""
        if len(self._data.tokens) > SOURCES_LOGGED:
            return {}
        read = self._data.tokens_read(step)
        return {f"data/tokens/{name}": count for name, count in read.items()}

    def _read(self, step: int) -> Batch:
        rows = rows_of_rank(self._data.num_rows(step), self._reader, self._num_readers)
        batch = self._data.batch(step, rows)
        if not self._config.reset_documents:
            batch = replace(batch, seq_idx=None)
        if self._languages is not None:
            names = [sample.source for sample in self._data.sample_ids(step, rows)]
            batch = self._languages.label(batch, names, step)
        return batch.look_ahead(self._depths)
