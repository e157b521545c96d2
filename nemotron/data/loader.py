"""The rows of every step, and the held-out rows of every domain."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemotron.data.batch import NO_LABEL, Batch, Row, pack
from nemotron.data.config import DataConfig
from nemotron.data.fingerprint import check_same_data
from nemotron.data.languages import Languages
from nemotron.data.mixture import Mixtures, Timeline
from nemotron.data.opening import Sources
from nemotron.data.prefetch import Prefetcher
from nemotron.data.source import Source
from nemotron.data.tokenizer import load_tokenizer
from nemotron.errors import UserError

DESCRIBED = 20
"""Sources that the log describes one by one."""
SOURCES_LOGGED = 64
"""Sources up to which the tokens read from each are logged."""


@dataclass(frozen=True)
class SampleId:
    """Names one row: the sample `sample` of pass `epoch` over `source` in rows of `seq_len`."""

    source: str
    seq_len: int
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
    run resumes at any step by asking for that step. A source that comes again in a later phase
    goes on where it stopped; in rows of another length it begins a pass of its own.
    """

    def __init__(
        self, config: DataConfig, timeline: Timeline, *, seed: int, vocab_size: int
    ) -> None:
        """Open every source; embedded domains are tokenized into `config.cache` on first use.

        Raises:
            UserError: when the tokenizer, the cache or a shard is unfit.
        """
        self.config = config
        self.timeline = timeline
        self.tokenizer = load_tokenizer(config.tokenizer)
        self.eod_id = self.tokenizer.id(config.eod_token)
        self._seed = seed
        limit = min(vocab_size, self.tokenizer.vocab_size)
        opened = self._sources = Sources(config, timeline, self.tokenizer, limit)
        self.tokens, self.held_out = opened.tokens, opened.held_out
        self.mixtures = Mixtures(timeline, lambda name, length: opened.rows(name, length, seed))
        self._held_out = opened.held_out_rows()

    @property
    def validation_domains(self) -> list[str]:
        """Sources with held-out text, in the recipe's order."""
        return list(self._held_out)

    @property
    def has_conversations(self) -> bool:
        """Whether any source says which of its tokens are learned."""
        return any(tokens.train.is_supervised for tokens in self.tokens.values())

    def seq_len(self, step: int) -> int:
        """Return the tokens in a row of this step."""
        return self.mixtures.locate(step)[0].seq_len

    def num_rows(self, step: int) -> int:
        """Return the rows of a step."""
        return self.mixtures.locate(step)[0].rows_per_step

    def sample_ids(self, step: int, rows: slice = slice(None)) -> list[SampleId]:
        """Return the rows of a step, counted from 0, in their order, or some of them."""
        return [SampleId(source.name, source.seq_len, *at) for source, at in self._rows(step, rows)]

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """Return the rows of a step, or those that one process takes (`rows_of_rank`).

        Raises:
            UserError: when a shard was changed since it was opened.
        """
        found = [source.row(*at) for source, at in self._rows(step, rows)]
        return self._pack(found, self.seq_len(step))

    def planned(self, source: str, seq_len: int, samples: Sequence[int]) -> Batch:
        """Return some of a source's rows of whole documents, whatever step reads them.

        Raises:
            UserError: when a shard was changed since it was opened.
        """
        owner = self.mixtures.sources[source, seq_len]
        return self._pack([owner.row(0, sample) for sample in samples], seq_len)

    def planned_held_out(self, domain: str, samples: Sequence[int]) -> Batch:
        """Return some of a domain's held-out rows of whole documents."""
        owner = self._held_out[domain]
        return self._pack([owner.planned(sample) for sample in samples], self.config.seq_len)

    def num_held_out(self, domain: str, *, tokens: int) -> int:
        """Return how many rows of a domain an evaluation of so many tokens reads."""
        return min(self._share(tokens), self._held_out[domain].num_rows)

    def validation(self, domain: str, *, tokens: int, rows: int) -> Iterator[ValidationBatch]:
        """Yield held-out rows of a domain, `rows` at a time, always the same ones.

        `tokens` is the budget of one evaluation; the domains share it equally, in whole rows.
        """
        found = self._held_out[domain].rows(self._share(tokens))
        for first in range(0, len(found), rows):
            batch = self._pack(found[first : first + rows], self.config.seq_len)
            counted = batch.labels[batch.labels != NO_LABEL].numpy()
            yield ValidationBatch(batch, int(self.tokenizer.token_bytes[counted].sum()))

    def _share(self, tokens: int) -> int:
        return max(1, tokens // len(self._held_out) // self.config.seq_len)

    def tokens_read(self, step: int) -> dict[str, int]:
        """Return the tokens of each source in the rows of all steps before this one."""
        total = dict.fromkeys(self.tokens, 0)
        for (name, seq_len), rows in self.mixtures.rows_read(step).items():
            total[name] += rows * seq_len
        return total

    def epochs(self, step: int) -> dict[str, float]:
        """Return how many passes over each source all steps before this one make."""
        total = dict.fromkeys(self.tokens, 0.0)
        for (name, seq_len), rows in self.mixtures.rows_read(step).items():
            total[name] += rows / self.mixtures.sources[name, seq_len].num_rows
        return total

    def limit_of(self, name: str) -> float | None:
        """Return the most passes that a source may be read."""
        own = self._sources.configs[name].max_epochs
        return self.config.max_epochs if own is None else own

    def check_length(self) -> None:
        """Check that the run reads no source more often than its `max_epochs`.

        Raises:
            UserError: when it does, with the tokens it has and those that the run needs.
        """
        num_steps = self.timeline.num_steps
        needed = self.tokens_read(num_steps)
        for name, epochs in self.epochs(num_steps).items():
            limit = self.limit_of(name)
            if limit is not None and epochs > limit:
                raise UserError(
                    f"do not suffice: {num_steps} steps need {needed[name]} tokens of {name}, "
                    f"which has {self.tokens[name].train.num_tokens}: {epochs:.2f} passes, where "
                    f"max_epochs = {limit:g}; train for fewer steps, lower its weight or raise "
                    "max_epochs.",
                    key="data.sources",
                )

    def describe(self) -> list[str]:
        """Return a line for each source and each change of phase, for the log."""
        num_steps = self.timeline.num_steps
        needed, whole = self.tokens_read(num_steps), max(1, self.timeline.num_tokens)
        lines = []
        for name, tokens in list(self.tokens.items())[:DESCRIBED]:
            train, held_out = tokens.train, tokens.validation
            lines.append(
                f"{name}: {needed[name] / whole:.1%} of the tokens; {train.num_tokens:,} tokens "
                f"in {train.num_documents:,} documents to train on, "
                f"{held_out.num_tokens:,} in {held_out.num_documents:,} held out"
            )
            lines += [
                f"{name}: {source.packing}"
                for (owner, _), source in self.mixtures.sources.items()
                if owner == name and source.packing
            ]
        if (more := len(self.tokens) - DESCRIBED) > 0:
            lines.append(f"and {more:,} more sources")
        if len(self.timeline.phases) > 1:
            lines += self.timeline.describe()
        return lines

    def fingerprint(self) -> dict[str, Any]:  # Any: nested JSON
        """Return what the order and content of all rows depend on, to be kept with a checkpoint."""
        return {
            "seed": self._seed,
            "data.seq_len": self.config.seq_len,
            "data.packing": self.config.packing.model_dump(),
            "data.objective": self.config.objective,
            "data.mask_eod_loss": self.config.mask_eod_loss,
            "data.tokenizer": self.tokenizer.hash,
            "data.eod_token": self.eod_id,
            "sources": {
                name: {"tokens": tokens.train.num_tokens, "content": tokens.identity}
                for name, tokens in self.tokens.items()
            },
            "phases": self.timeline.record(),
        }

    def check_fingerprint(self, saved: Mapping[str, Any], step: int) -> None:
        """Check that the rows of the steps before `step`, by a checkpoint's fingerprint, are ours.

        Raises:
            UserError: when they are not, naming the file or the setting that differs.
        """
        files = {
            name: Path(self._sources.configs[name].path or tokens.path)
            for name, tokens in self.tokens.items()
        }
        check_same_data(saved, self.fingerprint(), files, self.timeline.phase_of(max(0, step - 1)))

    def _rows(self, step: int, rows: slice) -> Iterator[tuple[Source, tuple[int, int]]]:
        mixture, before = self.mixtures.locate(step)
        return mixture.rows(before, rows)

    def _pack(self, rows: list[Row], seq_len: int) -> Batch:
        return pack(rows, seq_len, self.eod_id, mask_eod_loss=self.config.mask_eod_loss)


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
        self._pin, depth = pin, config.prefetch_steps
        self._ahead = Prefetcher(self._read, depth=depth, num_steps=num_steps) if depth else None

    def take(self, step: int) -> Batch:
        """Return the rows of a step; whatever was wrong with reading them is raised here."""
        return self._read(step) if self._ahead is None else self._ahead.take(step)

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
        batch = batch.look_ahead(self._depths)
        return batch.pin() if self._pin else batch


def rows_of_rank(num_rows: int, rank: int, num_ranks: int) -> slice:
    """Return the rows of a step that one of `num_ranks` data-parallel ranks reads.

    Ranks of one tensor- or context-parallel group share a data-parallel rank, and so its rows.

    Raises:
        UserError: when the ranks cannot share the rows evenly.
    """
    if num_rows % num_ranks:
        raise UserError(
            f"gives {num_rows} rows a step, which {num_ranks} data-parallel ranks cannot share "
            f"evenly; use a multiple of {num_ranks} rows.",
            key="batch.global_tokens",
        )
    share = num_rows // num_ranks
    return slice(rank * share, (rank + 1) * share)
