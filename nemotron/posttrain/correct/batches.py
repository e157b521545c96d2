"""Pairs as a source of batches: laid out anew in each pass, whole ones packed into rows."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import NonNegativeInt, ValidationError

from nemotron.checkpoint.records import explain
from nemotron.data.batch import NO_LABEL, Batch
from nemotron.errors import UserError
from nemotron.posttrain.correct.config import CorrectConfig
from nemotron.posttrain.correct.layout import RUN, Example, Specials, lay_out
from nemotron.posttrain.correct.pairs import PairSource
from nemotron.section import Section


@dataclass
class Progress:
    """How far a run has come in its sources, and what it left out."""

    taken: dict[str, int]
    """Pairs taken of each source."""
    infeasible: int = 0
    """Pairs whose slots could not hold their target."""
    too_long: int = 0
    """Pairs that did not fit into a row."""


class SavedProgress(Section):
    """The same in the state of a checkpoint."""

    taken: dict[str, NonNegativeInt]
    infeasible: NonNegativeInt
    too_long: NonNegativeInt


class PairBatches:
    """Batches of pairs; every reader lays out all rows of a step, and takes its share.

    A pair is drawn and laid out by its number alone, so that a checkpoint needs no more than how
    many were taken of each source.
    """

    def __init__(
        self,
        config: CorrectConfig,
        sources: Sequence[PairSource],
        specials: Specials,
        *,
        reader: int = 0,
        num_readers: int = 1,
    ) -> None:
        self._config, self._specials = config, specials
        self._sources = {source.name: source for source in sources}
        self._weights = {source.name: source.weight for source in config.data.sources}
        self._num_pairs = sum(len(source.pairs) for source in sources)
        self._reader, self._num_readers = reader, num_readers
        self._progress = Progress(dict.fromkeys(self._sources, 0))

    def take(self, step: int) -> Batch:
        """Return this reader's rows of a step."""
        data, batch = self._config.data, self._config.batch
        rows: list[list[Example]] = [[] for _ in range(batch.global_tokens // data.seq_len)]
        room = [data.seq_len] * len(rows)
        missed = 0
        while True:
            name = self._next_source()
            example = self._lay_out(name, step)
            missed = missed + 1 if example is None else 0
            if missed > self._num_pairs:
                raise UserError(
                    f"gives rows into which none of {self._num_pairs} pairs fits with its slots; "
                    "use longer rows.",
                    key="data.seq_len",
                    value=data.seq_len,
                )
            if example is not None:
                fitting = [r for r, left in enumerate(room) if left >= example.length]
                if not fitting:
                    break  # it comes first in the next step
                fullest = min(fitting, key=lambda row: (room[row], row))
                rows[fullest].append(example)
                room[fullest] -= example.length
            self._progress.taken[name] += 1
        share = len(rows) // self._num_readers
        own = rows[self._reader * share : (self._reader + 1) * share]
        return pack_examples(own, data.seq_len, self._specials.end)

    def state(self) -> dict[str, Any]:  # Any: nested JSON
        """Return how many pairs were taken, and of which sources."""
        return {
            "pairs": {**vars(self._progress), "taken": dict(self._progress.taken)},
            "sources": {name: source.identity for name, source in self._sources.items()},
        }

    def restore(self, saved: Mapping[str, Any], step: int) -> None:
        """Go on after the pairs that were taken.

        Raises:
            UserError: when the checkpoint is of another kind of run, of other pairs, or damaged.
        """
        if saved.keys() != {"pairs", "sources"}:
            raise UserError(
                f"the checkpoint of step {step} is of a run without pairs; begin a new run with "
                "init_from."
            )
        own, known = self.state()["sources"], saved["sources"]
        for name, identity in own.items():
            if not isinstance(known, dict) or known.get(name) != identity:
                raise UserError(
                    f"has other pairs in {name} than the run before step {step}; restore them, or "
                    "begin a new run with init_from.",
                    key="data.sources",
                )
        self._progress = _read_progress(saved["pairs"], own.keys(), step)

    def metrics(self, step: int) -> dict[str, float]:
        """Return the pairs of each source so far, and those left out."""
        progress = self._progress
        values: dict[str, float] = {
            f"data/pairs/{name}": count for name, count in progress.taken.items()
        }
        return values | {
            "correct/infeasible": progress.infeasible,
            "correct/too_long": progress.too_long,
        }

    def _next_source(self) -> str:
        """Return the source of which most is missing for its share."""
        taken = self._progress.taken
        total = sum(taken.values()) + 1
        whole = sum(self._weights[name] for name in taken)
        return max(taken, key=lambda name: total * self._weights[name] / whole - taken[name])

    def _lay_out(self, name: str, step: int) -> Example | None:
        """Lay out the next pair of a source; None, and it is counted, if it has no place."""
        options = self._config.correct
        pair, random = self._sources[name].pair(self._progress.taken[name])
        is_first = step < options.first_steps
        share = options.first_pseudo_errors if is_first else options.pseudo_errors
        example = lay_out(pair, options, self._specials, random, share)
        if example is None:
            self._progress.infeasible += 1
        elif example.length > self._config.data.seq_len:
            self._progress.too_long += 1
            return None
        return example


def pack_examples(rows: Sequence[Sequence[Example]], seq_len: int, filler: int) -> Batch:
    """Make a batch of whole examples; what is left of a row is padding."""
    first = next(example for row in rows for example in row)
    width = first.columns.shape[1]
    columns = np.full((len(rows), seq_len, width), filler, np.int64)
    labels = np.full((len(rows), seq_len), NO_LABEL, np.int64)
    seq_idx = np.zeros((len(rows), seq_len), np.int32)
    padding = np.ones((len(rows), seq_len), np.bool_)
    extras = {
        name: np.full((len(rows), seq_len, *values.shape[1:]), NO_LABEL, np.int64)
        for name, values in first.extras.items()
    }
    for number, row in enumerate(rows):
        at = runs = 0
        for document, example in enumerate(row):
            own = slice(at, at + example.length)
            columns[number, own], labels[number, own] = example.columns, example.labels
            seq_idx[number, own], padding[number, own] = document, False
            for name, values in example.extras.items():
                extras[name][number, own] = values
            if RUN in extras:  # numbers are those in the row
                found = extras[RUN][number, own]
                found[found != NO_LABEL] += runs
                runs = max(runs, int(found.max()) + 1)
            at += example.length
        seq_idx[number, at:] = len(row)
    candidates = torch.from_numpy(columns)
    return Batch(
        input_ids=candidates[:, :, 0].contiguous(),
        labels=torch.from_numpy(labels),
        seq_idx=torch.from_numpy(seq_idx),
        extras={name: torch.from_numpy(values) for name, values in extras.items()},
        padding=torch.from_numpy(padding) if padding.any() else None,
        candidates=candidates if width > 1 else None,
    )


def _read_progress(saved: Any, names: Collection[str], step: int) -> Progress:  # Any: JSON
    """Return how far these sources were read; others, which a recipe left out, are forgotten.

    Raises:
        UserError: when it is damaged.
    """
    try:
        found = SavedProgress.model_validate(saved)
    except ValidationError as error:
        rule = f"pairs in the checkpoint of step {step} are damaged: {explain(error)}"
        raise UserError(f"{rule}; resume from another one.") from None
    for name in names:
        if name not in found.taken:
            raise UserError(
                f"pairs in the checkpoint of step {step} are damaged: taken.{name} is missing; "
                "resume from another one."
            )
    taken = {name: found.taken[name] for name in names}
    return Progress(taken, found.infeasible, found.too_long)
