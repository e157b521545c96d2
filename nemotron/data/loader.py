"""The rows of every step, and the held-out rows of every domain."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron.data.batch import NO_LABEL, Batch
from nemotron.data.blend import Blend
from nemotron.data.config import DataConfig
from nemotron.data.packing import pack
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
        cache = Path(config.cache)
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"data.cache: cannot make the folder {cache.absolute()}: {error}."
            ) from error
        limit = min(vocab_size, self.tokenizer.vocab_size)
        self.sources = {
            source.name: Source(source, config, self.tokenizer, seed=seed, limit=limit)
            for source in config.sources
        }
        self._names = list(self.sources)
        self._blend = Blend([source.weight for source in config.sources])

    @property
    def validation_domains(self) -> list[str]:
        """Sources with held-out text."""
        return [n for n, source in self.sources.items() if source.validation.num_tokens > 1]

    def sample_ids(self, step: int) -> list[SampleId]:
        """Return the rows of a step, counted from 0, in their order."""
        first = step * self.rows_per_step
        ids = []
        for row in range(first, first + self.rows_per_step):
            number, index = self._blend.locate(row)
            name = self._names[number]
            ids.append(SampleId(name, *self.sources[name].place(index)))
        return ids

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """Return the rows of a step, or those that one process takes.

        Raises:
            UserError: when a shard was changed since it was opened.
        """
        windows = []
        for sample_id in self.sample_ids(step)[rows]:
            source = self.sources[sample_id.source]
            source.shard.check_unchanged()
            windows.append(source.window(sample_id.epoch, sample_id.sample))
        return self._pack(windows)

    def validation(self, domain: str, *, tokens: int, rows: int) -> Iterator[ValidationBatch]:
        """Yield held-out rows of a domain, `rows` at a time, always the same ones.

        `tokens` is the budget of one evaluation; the domains share it equally, in whole rows.
        """
        source = self.sources[domain]
        source.shard.check_unchanged()
        share = max(1, tokens // self.config.seq_len // len(self.validation_domains))
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
        """Check that no source is read more often than `data.max_epochs` allows.

        Raises:
            UserError: when one is, with the tokens it has and those that the run needs.
        """
        if self.config.max_epochs is None:
            return
        for name, epochs in self.epochs(num_steps).items():
            if epochs > self.config.max_epochs:
                source = self.sources[name]
                raise UserError(
                    f"data.sources: {name} has {source.train.num_tokens} tokens to train on, but "
                    f"{num_steps} steps need {round(epochs * source.num_samples) * self.config.seq_len}"
                    f" of it, {epochs:.2f} passes, where data.max_epochs = {self.config.max_epochs:g};"
                    " train for fewer steps, lower its weight or raise data.max_epochs."
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
        """Return what the order and the content of all rows hang on, to be kept with a checkpoint."""
        return {
            "seed": self._seed,
            "rows_per_step": self.rows_per_step,
            "seq_len": self.config.seq_len,
            "validation_fraction": self.config.validation_fraction,
            "mask_eod_loss": self.config.mask_eod_loss,
            "tokenizer": self.tokenizer.hash,
            "eod_id": self.eod_id,
            "sources": {
                name: {
                    "weight": source.weight,
                    "tokens": source.contents.tokens,
                    "content": source.contents.hash,
                }
                for name, source in self.sources.items()
            },
        }

    def check_fingerprint(self, saved: dict[str, Any]) -> None:
        """Check that a checkpoint's rows are ours.

        Raises:
            UserError: when they are not, naming the file or the setting that differs.
        """
        now = self.fingerprint()
        if list(saved["sources"]) != list(now["sources"]):
            raise UserError(
                f"data.sources was {', '.join(saved['sources'])} when the checkpoint was written and "
                f"is {', '.join(now['sources'])} now; restore it or start a new run."
            )
        for name, source in now["sources"].items():
            then = saved["sources"][name]
            shard = self.sources[name].shard
            if (then["tokens"], then["content"]) != (source["tokens"], source["content"]):
                raise UserError(
                    f"{shard.bin} is not the shard of the checkpoint: it has {source['tokens']} tokens "
                    f"with hash {source['content']}, where there were {then['tokens']} with hash "
                    f"{then['content']}; restore the file or start a new run."
                )
            if then["weight"] != source["weight"]:
                raise UserError(
                    f"data.sources: the weight of {name} was {then['weight']:g} when the checkpoint was "
                    f"written and is {source['weight']:g} now; restore it or start a new run."
                )
        for key, value in now.items():
            if key != "sources" and saved[key] != value:
                raise UserError(
                    f"{key} was {saved[key]} when the checkpoint was written and is {value} now; "
                    "restore it or start a new run."
                )

    def _pack(self, windows: list) -> Batch:
        return pack(
            windows, self.config.seq_len, self.eod_id, mask_eod_loss=self.config.mask_eod_loss
        )
