"""The rows of every step, and the held-out rows of every domain."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemotron.data.batch import NO_LABEL, Batch, pack
from nemotron.data.config import DataConfig
from nemotron.data.fingerprint import check_same_data
from nemotron.data.order import Blend
from nemotron.data.source import Source
from nemotron.data.tokenizer import load_tokenizer
from nemotron.errors import UserError


@dataclass(frozen=True)
class SampleId:
    """Names one row: the sample number `sample` of pass `epoch` over `source`."""

    source: str
    epoch: int
    sample: int


@dataclass(frozen=True)
class ValidationBatch:
    """Held-out rows, and the bytes of text that their labels stand for."""

    batch: Batch
    num_bytes: int


class TrainingData:
    """Every row of a run as a pure function of (seed, step, position in the step).

    Nothing depends on what was asked before, on micro-batches or on the number of processes: a
    run resumes at any step by asking for that step.
    """

    def __init__(
        self, config: DataConfig, *, seed: int, rows_per_step: int, vocab_size: int
    ) -> None:
        """Open every source; embedded domains are tokenized into `config.cache` on first use.

        Raises:
            UserError: when the tokenizer, the cache or a shard is unfit.
        """
        self.config = config
        self.rows_per_step = rows_per_step
        self.tokenizer = load_tokenizer(config.tokenizer)
        self.eod_id = self.tokenizer.id(config.eod_token)
        self._seed = seed
        _make_writable(Path(config.cache))
        limit = min(vocab_size, self.tokenizer.vocab_size)
        self.sources = {
            source.name: Source(source, config, self.tokenizer, seed=seed, limit=limit)
            for source in config.sources
        }
        self._names = list(self.sources)
        self._blend = Blend([source.weight for source in config.sources])

    @property
    def validation_domains(self) -> list[str]:
        """Sources with held-out text, in the recipe's order."""
        return [n for n, source in self.sources.items() if source.validation.num_tokens > 1]

    def sample_ids(self, step: int, rows: slice = slice(None)) -> list[SampleId]:
        """Return the rows of a step, counted from 0, in their order, or some of them."""
        first = step * self.rows_per_step
        ids = []
        for row in range(first, first + self.rows_per_step)[rows]:
            number, index = self._blend.locate(row)
            name = self._names[number]
            ids.append(SampleId(name, *self.sources[name].place(index)))
        return ids

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """Return the rows of a step, or those that one process takes.

        Raises:
            UserError: when a shard was changed since it was opened.
        """
        for source in self.sources.values():
            source.shard.check_unchanged()
        ids = self.sample_ids(step, rows)
        return self._pack([self.sources[i.source].window(i.epoch, i.sample) for i in ids])

    def validation(self, domain: str, *, tokens: int, rows: int) -> Iterator[ValidationBatch]:
        """Yield held-out rows of a domain, `rows` at a time, always the same ones.

        `tokens` is the budget of one evaluation; the domains share it equally, in whole rows.
        """
        source = self.sources[domain]
        source.shard.check_unchanged()
        share = max(1, tokens // len(self.validation_domains) // self.config.seq_len)
        windows = source.held_out_windows(share)
        for first in range(0, len(windows), rows):
            batch = self._pack(windows[first : first + rows])
            counted = batch.labels[batch.labels != NO_LABEL].numpy()
            yield ValidationBatch(batch, int(self.tokenizer.token_bytes[counted].sum()))

    def epochs(self, num_steps: int) -> dict[str, float]:
        """Return how many passes over each source a run of `num_steps` makes."""
        counts = self._blend.counts(num_steps * self.rows_per_step)
        return {
            name: counts[number] / self.sources[name].num_samples
            for number, name in enumerate(self._names)
        }

    def check_length(self, num_steps: int) -> None:
        """Check that a run of `num_steps` reads no source more often than `data.max_epochs`.

        Raises:
            UserError: when one is, with the tokens it has and those that the run needs.
        """
        limit = self.config.max_epochs
        for name, epochs in self.epochs(num_steps).items():
            if limit is not None and epochs > limit:
                source = self.sources[name]
                needed = round(epochs * source.num_samples) * self.config.seq_len
                raise UserError(
                    f"data.sources: {num_steps} steps need {needed} tokens of {name}, which has "
                    f"{source.train.num_tokens}: {epochs:.2f} passes, where data.max_epochs = "
                    f"{limit:g}; train for fewer steps, lower its weight or raise data.max_epochs."
                )

    def describe(self) -> list[str]:
        """Return one line for each source, for the log."""
        total = sum(source.weight for source in self.sources.values())
        return [
            f"{name}: {source.weight / total:.1%} of the rows; {source.train.num_tokens:,} tokens "
            f"in {len(source.train.documents):,} documents to train on, "
            f"{source.validation.num_tokens:,} in {len(source.validation.documents):,} held out"
            for name, source in self.sources.items()
        ]

    def fingerprint(self) -> dict[str, Any]:  # Any: strings and numbers, for JSON
        """Return what the order and content of all rows hang on, to be kept with a checkpoint."""
        return {
            "seed": self._seed,
            "rows_per_step": self.rows_per_step,
            "data.seq_len": self.config.seq_len,
            "data.mask_eod_loss": self.config.mask_eod_loss,
            "data.validation_fraction": self.config.validation_fraction,
            "data.tokenizer": self.tokenizer.hash,
            "data.eod_token": self.eod_id,
            "sources": {
                name: {
                    "weight": source.weight,
                    "tokens": source.contents.tokens,
                    "content": source.contents.hash,
                }
                for name, source in self.sources.items()
            },
        }

    def check_fingerprint(self, saved: Mapping[str, Any]) -> None:
        """Check that the rows of a checkpoint, by its fingerprint, are ours.

        Raises:
            UserError: when they are not, naming the file or the setting that differs.
        """
        files = {name: source.shard.bin for name, source in self.sources.items()}
        check_same_data(saved, self.fingerprint(), files)

    def _pack(self, windows: list[NDArray[np.int64]]) -> Batch:
        return pack(
            windows, self.config.seq_len, self.eod_id, mask_eod_loss=self.config.mask_eod_loss
        )


def _make_writable(cache: Path) -> None:
    """Make the cache folder, and find out now whether it can be written."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        (cache / ".lock").touch()
    except OSError as error:
        raise UserError(
            f"data.cache: {cache.absolute()} cannot be written ({error.strerror}); "
            "name a folder that can."
        ) from error
