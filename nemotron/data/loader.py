"""The rows of every step, and the held-out rows of every domain."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron.data.batch import NO_LABEL, Batch, Row, pack
from nemotron.data.config import (
    ChatDataConfig,
    DataConfig,
    PreferenceDataConfig,
    SourceConfig,
)
from nemotron.data.conversations import (
    check_preferences,
    check_supervised,
    check_texts,
    prepare_conversations,
)
from nemotron.data.correct.marks import marks_of
from nemotron.data.embedded import prepare_embedded
from nemotron.data.fingerprint import check_same_data
from nemotron.data.folder import TokenSet, open_source
from nemotron.data.indexed import Stream
from nemotron.data.mixture import Mixtures
from nemotron.data.raw import tokens_of
from nemotron.data.source import HeldOut, Mask, Source
from nemotron.data.timeline import RowLength, Timeline
from nemotron.data.tokenizer import load_tokenizer
from nemotron.errors import UserError

log = logging.getLogger(__name__)

DESCRIBED = 20
"""Sources that the log describes one by one."""


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
        self._limit = min(vocab_size, self.tokenizer.vocab_size)
        make_writable(Path(config.cache))
        self.tokens: dict[str, TokenSet] = {}
        self._configs: dict[str, SourceConfig] = {}
        self._open_sources()
        self.mixtures = Mixtures(timeline, self._rows_of)
        self.held_out = self._open_held_out()
        """All text that is never trained on: of the sources, then of `data.validation`."""
        self._held_out = self._rows_held_out()

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
        own = self._configs[name].max_epochs
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
            lines += self._describe_phases()
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
            "phases": [
                {
                    "name": phase.name,
                    "num_steps": phase.num_steps,
                    "tokens_per_step": phase.tokens_per_step,
                    "lengths": [_describe_length(length) for length in phase.lengths],
                }
                for phase in self.timeline.phases
            ],
        }

    def check_fingerprint(self, saved: Mapping[str, Any], step: int) -> None:
        """Check that the rows of the steps before `step`, by a checkpoint's fingerprint, are ours.

        Raises:
            UserError: when they are not, naming the file or the setting that differs.
        """
        files = {
            name: Path(self._configs[name].path or tokens.path)
            for name, tokens in self.tokens.items()
        }
        check_same_data(saved, self.fingerprint(), files, self.timeline.phase_of(max(0, step - 1)))

    def _open_sources(self) -> None:
        named_by: dict[str, SourceConfig] = self._configs
        for phase in self.timeline.phases:
            for leaf in (leaf for length in phase.lengths for leaf in length.leaves):
                source = leaf.source
                known = named_by.setdefault(source.name, source)
                if (known.path, known.validation) != (source.path, source.validation):
                    raise UserError(
                        f"name {source.name} with the paths {known.path} and {source.path}; "
                        "give different data different names.",
                        key="phases",
                    )
        for name, source in named_by.items():
            self.tokens[name] = self._open(source, self.config.validation_fraction)

    def _open(self, source: SourceConfig, hold_out: float) -> TokenSet:
        """Open a source; what is not tokens yet is made so, with this share held out."""
        config, tokenizer = self.config, self.tokenizer
        if isinstance(config, ChatDataConfig | PreferenceDataConfig):
            return self._open_conversations(source, config, hold_out)
        beside = source.validation
        if source.path is None:
            path = str(prepare_embedded(source.name, config, tokenizer))
        else:
            path = tokens_of(source.path, config, tokenizer, 0.0 if beside else hold_out)
        if beside is not None:
            beside = tokens_of(beside, config, tokenizer, 0.0)
        source = source.model_copy(update={"path": path, "validation": beside})
        opened = open_source(source, config, tokenizer, self._limit)
        check_texts(source.name, opened)
        return opened

    def _open_conversations(
        self, source: SourceConfig, config: ChatDataConfig | PreferenceDataConfig, hold_out: float
    ) -> TokenSet:
        """Open conversations, which are prepared first if needed."""
        tokenizer, beside = self.tokenizer, source.validation
        if source.path is None:
            path = str(prepare_embedded(source.name, config, tokenizer))
            source = source.model_copy(update={"path": path})
        share = 0.0 if beside is not None else hold_out
        source = prepare_conversations(source, config, tokenizer, share)
        if beside is not None:
            held = SourceConfig(name=source.name, path=beside)
            held = prepare_conversations(held, config, tokenizer, 0.0)
            source = source.model_copy(update={"validation": held.path})
        opened = open_source(source, config, tokenizer, self._limit)
        if isinstance(config, PreferenceDataConfig):
            check_preferences(source.name, opened)
            return opened
        check_texts(source.name, opened)
        check_supervised(source.name, opened)
        return opened

    def _rows_of(self, name: str, seq_len: int) -> Source:
        tokens = self.tokens[name]
        return Source(
            name,
            tokens,
            self.config,
            seq_len,
            seed=self._seed,
            limit=self._limit,
            mask=self._mask(),
        )

    def _mask(self) -> Mask | None:
        """Return what hides right tokens of texts to be corrected, if the recipe wants that."""
        config = self.config
        if not isinstance(config, ChatDataConfig) or not config.mask_correct:
            return None
        return Mask(marks_of(self.tokenizer, self._limit).mask, config.mask_correct)

    def _rows(self, step: int, rows: slice) -> Iterator[tuple[Source, tuple[int, int]]]:
        mixture, before = self.mixtures.locate(step)
        return mixture.rows(before, rows)

    def _open_held_out(self) -> dict[str, Stream]:
        streams = {name: tokens.validation for name, tokens in self.tokens.items()}
        for extra in self.config.validation:
            opened = self._open(SourceConfig(name=extra.name, path=extra.path), 0.0)
            streams[extra.name] = Stream([*opened.train.shards, *opened.validation.shards])
        return streams

    def _rows_held_out(self) -> dict[str, HeldOut]:
        """Return the rows of each domain that has some, and warn of a source without.

        Raises:
            UserError: when a set of `data.validation` has none.
        """
        found = {}
        for name, stream in self.held_out.items():
            rows = None
            if stream.num_tokens > 1:
                rows = HeldOut(name, stream, self.config, self._limit)
            if rows is not None and rows.num_rows:
                found[name] = rows
                continue
            documents = f"{stream.num_documents} documents with {stream.num_tokens} tokens"
            if name not in self.tokens:
                raise UserError(
                    f"has {documents}, which make no row of data.seq_len = {self.config.seq_len} "
                    "(data.packing may drop them); remove it, or give documents that fit.",
                    key="data.validation",
                    value=name,
                )
            if self.holds_out(name):
                log.warning(
                    "%s has %s held out, so it is not evaluated; hold out a larger share, or name "
                    "another set in data.validation",
                    *(name, documents),
                )
        if not found:
            log.warning("no source has held-out text, so this run has no validation loss")
        return found

    def holds_out(self, name: str) -> bool:
        """Say whether a source was meant to have held-out text."""
        manifest, source = self.tokens[name].manifest, self._configs[name]
        fraction = manifest.validation_fraction if manifest is not None else 0.0
        return fraction > 0 or source.validation is not None

    def _describe_phases(self) -> Iterator[str]:
        seen: dict[str, set[int]] = {}
        for number, phase in enumerate(self.timeline.phases):
            lengths = " and ".join(f"{length.seq_len:,}" for length in phase.lengths)
            yield (
                f"phase {phase.name}: from token {self.timeline.first_tokens[number]:,}, "
                f"{phase.num_steps:,} steps of {phase.tokens_per_step:,} tokens in rows of "
                f"{lengths}"
            )
            for length in phase.lengths:
                for leaf in length.leaves:
                    known = seen.setdefault(leaf.source.name, set())
                    if known - {length.seq_len}:
                        yield (
                            f"phase {phase.name}: {leaf.source.name} starts a separate pass in "
                            f"rows of {length.seq_len:,}, in addition to the pass in rows of "
                            f"{', '.join(f'{n:,}' for n in sorted(known - {length.seq_len}))}"
                        )
                    known.add(length.seq_len)

    def _pack(self, rows: list[Row], seq_len: int) -> Batch:
        return pack(rows, seq_len, self.eod_id, mask_eod_loss=self.config.mask_eod_loss)


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


def make_writable(cache: Path) -> None:
    """Make the cache folder, and find out now whether it can be written.

    Raises:
        UserError: when it cannot.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        (cache / ".lock").touch()
    except OSError as error:
        rule = f"cannot be written ({error.strerror}); choose a writable folder."
        raise UserError(rule, key="data.cache", value=cache.absolute()) from error


def _describe_length(length: RowLength) -> dict[str, Any]:  # Any: nested JSON
    return {
        "seq_len": length.seq_len,
        "share": length.share,
        "sources": {leaf.source.name: leaf.weight for leaf in length.leaves},
    }
