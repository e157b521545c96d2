"""The sources of a run, opened: text and conversations are made into tokens on first use."""

import logging
from pathlib import Path

from nemotron.data.cache import make_writable
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
from nemotron.data.folder import TokenSet, open_source
from nemotron.data.indexed import Stream
from nemotron.data.mixture import Timeline
from nemotron.data.raw import tokens_of
from nemotron.data.source import HeldOut, Mask, Source
from nemotron.data.tokenizer import Tokenizer
from nemotron.errors import UserError

log = logging.getLogger(__name__)


class Sources:
    """Every source that some phase reads, and every text that is held out."""

    def __init__(
        self, config: DataConfig, timeline: Timeline, tokenizer: Tokenizer, limit: int
    ) -> None:
        """Open the sources; no token may be `limit` or above.

        Raises:
            UserError: when the cache or a source is unfit.
        """
        self._config, self._tokenizer, self._limit = config, tokenizer, limit
        make_writable(Path(config.cache))
        self.configs = named_sources(timeline)
        share = config.validation_fraction
        self.tokens = {name: self._open(source, share) for name, source in self.configs.items()}
        self.held_out = self._open_held_out(named_sets(config, timeline))
        """All text that is never trained on: of the sources, then of sets named `validation`."""

    def rows(self, name: str, seq_len: int, seed: int) -> Source:
        """Return the rows of one length of a source, in the order that the seed says."""
        tokens = self.tokens[name]
        return Source(
            name,
            tokens,
            self._config,
            seq_len,
            seed=seed,
            limit=self._limit,
            mask=self._mask(),
        )

    def held_out_rows(self) -> dict[str, HeldOut]:
        """Return the rows of each domain that has some, and warn of a source without.

        Raises:
            UserError: when a set of `data.validation` has none.
        """
        found = {}
        for name, stream in self.held_out.items():
            rows = None
            if stream.num_tokens > 1:
                rows = HeldOut(name, stream, self._config, self._limit)
            if rows is not None and rows.num_rows:
                found[name] = rows
                continue
            documents = f"{stream.num_documents} documents with {stream.num_tokens} tokens"
            if name not in self.tokens:
                raise UserError(
                    f"has {documents}, which make no row of data.seq_len = {self._config.seq_len} "
                    "(data.packing may drop them); remove it, or give documents that fit.",
                    key="data.validation",
                    value=name,
                )
            if self._holds_out(name):
                log.warning(
                    "%s has %s held out, so it is not evaluated; hold out a larger share, or name "
                    "another set in data.validation",
                    *(name, documents),
                )
        if not found:
            log.warning("no source has held-out text, so this run has no validation loss")
        return found

    def _open(self, source: SourceConfig, hold_out: float) -> TokenSet:
        """Open a source; what is not tokens yet is made so, with this share held out."""
        config, tokenizer = self._config, self._tokenizer
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
        tokenizer, beside = self._tokenizer, source.validation
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

    def _open_held_out(self, sets: dict[str, str]) -> dict[str, Stream]:
        streams = {name: tokens.validation for name, tokens in self.tokens.items()}
        for name, path in sets.items():
            opened = self._open(SourceConfig(name=name, path=path), 0.0)
            streams[name] = Stream([*opened.train.shards, *opened.validation.shards])
        return streams

    def _holds_out(self, name: str) -> bool:
        """Say whether a source was meant to have held-out text."""
        manifest, source = self.tokens[name].manifest, self.configs[name]
        fraction = manifest.validation_fraction if manifest is not None else 0.0
        return fraction > 0 or source.validation is not None

    def _mask(self) -> Mask | None:
        """Return what hides right tokens of texts to be corrected, if the recipe wants that."""
        config = self._config
        if not isinstance(config, ChatDataConfig) or not config.mask_correct:
            return None
        return Mask(marks_of(self._tokenizer, self._limit).mask, config.mask_correct)


def named_sources(timeline: Timeline) -> dict[str, SourceConfig]:
    """Return every source of every phase by its name.

    Raises:
        UserError: when two of one name have different paths.
    """
    named: dict[str, SourceConfig] = {}
    for leaf in timeline.leaves:
        source = leaf.source
        known = named.setdefault(source.name, source)
        if (known.path, known.validation) != (source.path, source.validation):
            raise UserError(
                f"name {source.name} with the paths {known.path} and {source.path}; "
                "give different data different names.",
                key="phases",
            )
    return named


def named_sets(config: DataConfig, timeline: Timeline) -> dict[str, str]:
    """Return the path of every set that is only evaluated, of the run and of its phases, by name.

    Raises:
        UserError: when a name has two paths, or is that of a source.
    """
    named: dict[str, str] = {}
    sources = {leaf.source.name for leaf in timeline.leaves}
    for extra in (*config.validation, *timeline.validation):
        path = named.setdefault(extra.name, extra.path)
        if path != extra.path or extra.name in sources:
            other = f"with the paths {path} and {extra.path}" if path != extra.path else "twice"
            raise UserError(
                f"name {extra.name} {other}; give each source and set its own name.", key="phases"
            )
    return named
