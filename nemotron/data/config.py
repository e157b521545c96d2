"""Where the text comes from, how it is blended and how it becomes rows."""

import re
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from nemotron.errors import RuleBroken
from nemotron.section import Section

EMBEDDED_DOMAINS = ("code", "docs", "verse")
"""Labeled domains of the corpus that ships with the package."""


MIXED = "mixed"
"""Language of a source whose texts switch between languages."""


def name_of(path: str) -> str:
    """Return the label of a path whose source has no name: its last part without endings."""
    plain = [part for part in PurePath(path).parts if not re.search(r"[*?\[]", part)]
    name = plain[-1].split(".")[0] if plain and plain[-1] != ".." else ""
    return name or "text"


def _with_name(value: Any) -> Any:  # Any: not yet validated
    """Return the keys of a source or set that is given as a path alone, or without a name."""
    if isinstance(value, str) and value:
        return {"name": value} if value in EMBEDDED_DOMAINS else _with_name({"path": value})
    if isinstance(value, dict) and "name" not in value and isinstance(value.get("path"), str):
        return {"name": name_of(value["path"]), **value}
    return value


class SourceConfig(Section):
    """One labeled stream of documents, or a group of them that share a weight.

    A text in place of the keys is the path; one that is the name of an embedded domain means that.
    """

    name: str = Field(min_length=1)
    """Label in metrics; absent: the last part of `path`. Without `path`, a domain of the embedded
    corpus: code, docs or verse."""
    weight: float = Field(1.0, gt=0)
    """Share of the training tokens, relative to the other sources of its group."""
    path: str | None = None
    """Folder from `nemotron data prepare`, folder of Megatron shards, or one shard; or text, as
    that command reads it, which is prepared into `cache` on first use."""
    validation: str | None = None
    """Held-out tokens for a source whose `path` has none; a path of the same kinds."""
    tier: str | None = None
    """Quality tier: a key of `tiers`, whose factor multiplies the weight."""
    max_epochs: float | None = Field(None, gt=0)
    """Largest number of passes over this source; absent: `data.max_epochs`."""
    language: str | None = None
    """Language of its text, one of `model.language_experts.languages`, or `mixed`."""
    sources: Annotated[tuple["SourceConfig", ...], Field(strict=False)] = ()
    """Members of a group. A group has no `path`."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, value: Any) -> Any:
        return _with_name(value)


class ValidationConfig(Section):
    """A set of documents that is only evaluated."""

    name: str = Field(min_length=1)
    """Label in metrics."""
    path: str
    """A path as that of a source; all its tokens are held out."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, value: Any) -> Any:
        return _with_name(value)


class MissingConfig(Section):
    """A category of the original mixture that this blend does not have."""

    name: str = Field(min_length=1)
    """Name of the category."""
    weight: float = Field(gt=0)
    """Weight in the original mixture. `nemotron data plan` shows it; no other source gets it."""


class BlendConfig(Section):
    """The sources and their proportions."""

    sources: Annotated[tuple[SourceConfig, ...], Field(strict=False, min_length=1)]
    """Sources and groups of sources."""
    tiers: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Factor of each quality tier, which multiplies the weights of its sources."""
    validation: Annotated[tuple[ValidationConfig, ...], Field(strict=False)] = ()
    """Sets of documents to evaluate in addition to the held-out documents of the sources."""
    missing: Annotated[tuple[MissingConfig, ...], Field(strict=False)] = ()
    """Categories of the original mixture that this blend lacks."""

    @model_validator(mode="after")
    def _check(self) -> "BlendConfig":
        names = [leaf.source.name for leaf in leaves(self)]
        names += [extra.name for extra in self.validation]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise RuleBroken("sources", f"names {twice!r} twice; give each source its own name")
        return self


class Leaf(Section):
    """A source of a blend with its share of the tokens and its group."""

    source: SourceConfig
    """The source itself, never a group."""
    weight: float
    """Weight after groups and tiers, relative to all other leaves."""
    group: str | None
    """Name of the outermost group."""


def leaves(blend: BlendConfig) -> list[Leaf]:
    """Return the sources of a blend without its groups, in order.

    A group's weight is shared by its members in proportion to theirs, each times the factor of its
    tier.

    Raises:
        ValueError: when a source is neither embedded nor has a path, or names an unknown tier.
    """
    return list(_leaves(blend.sources, blend.tiers, 1.0, None))


def _leaves(
    sources: Sequence[SourceConfig], tiers: dict[str, float], factor: float, group: str | None
) -> Iterator[Leaf]:
    for source in sources:
        if source.tier is not None and source.tier not in tiers:
            known = ", ".join(tiers) or "none"
            raise RuleBroken(
                "sources",
                f"names the tier {source.tier!r} for {source.name!r}, which is not a key of tiers "
                f"({known}); add its factor there",
            )
        weight = source.weight * (1.0 if source.tier is None else tiers[source.tier])
        if source.sources:
            if source.path is not None:
                raise RuleBroken(
                    "sources", f"{source.name!r} has a path and members; move the path to a member"
                )
            inner = list(_leaves(source.sources, tiers, 1.0, group or source.name))
            whole = sum(leaf.weight for leaf in inner)
            for leaf in inner:
                share = factor * weight * leaf.weight / whole
                yield leaf.model_copy(update={"weight": share})
            continue
        if source.path is None and source.name not in EMBEDDED_DOMAINS:
            raise RuleBroken(
                "sources",
                f"{source.name!r} has no path and is not an embedded domain; "
                f"add the path of its shards or use {', '.join(EMBEDDED_DOMAINS)}",
            )
        yield Leaf(source=source, weight=factor * weight, group=group)


class PackingConfig(Section):
    """How documents are packed into rows."""

    kind: Literal["concatenate", "sequential", "best_fit"] = "concatenate"
    """concatenate: join documents and cut; sequential, best_fit: pack whole documents."""
    long_documents: Literal["split", "drop", "truncate"] = "split"
    """What to do with a document longer than a row (kinds sequential and best_fit)."""


class LengthConfig(Section):
    """One of several row lengths that alternate from step to step."""

    seq_len: int = Field(gt=1)
    """Tokens in a row. Steps have the same number of tokens for every row length."""
    share: float = Field(gt=0)
    """Share of the steps, relative to the other row lengths."""
    blend: BlendConfig | None = None
    """Blend for these rows; absent: the blend of the phase."""


class DataConfig(Section):
    """Sources, tokenizer and rows."""

    sources: Annotated[tuple[SourceConfig, ...], Field(strict=False, min_length=1)] = (
        SourceConfig(name="code", weight=0.5),
        SourceConfig(name="docs", weight=0.3),
        SourceConfig(name="verse", weight=0.2),
    )
    """Sources and groups of sources, with their weights."""
    tiers: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Factor of each quality tier, which multiplies the weights of its sources."""
    validation: Annotated[tuple[ValidationConfig, ...], Field(strict=False)] = ()
    """Sets of documents to evaluate in addition to the held-out documents of the sources."""
    missing: Annotated[tuple[MissingConfig, ...], Field(strict=False)] = ()
    """Categories of the original mixture that this blend lacks."""
    tokenizer: str = "embedded"
    """`embedded` (the byte-level BPE of the package), or the path of a `tokenizer.json`."""
    eod_token: str = Field("</s>", min_length=1)
    """Token that ends each document in the shards."""
    cache: str = "runs/.cache"
    """Folder for the tokenized embedded corpus, for sources that are text, and for plans of packed
    rows."""
    seq_len: int = Field(512, gt=1)
    """Tokens in a row. Validation uses this length in every phase."""
    lengths: Annotated[tuple[LengthConfig, ...], Field(strict=False)] = ()
    """Row lengths that alternate from step to step; absent: all rows have `seq_len` tokens."""
    packing: PackingConfig = PackingConfig()
    """How documents are packed into rows."""
    reset_documents: bool = False
    """Whether attention, convolution and state stop at document boundaries within a row."""
    mask_eod_loss: bool = False
    """Whether the loss leaves out the prediction of the first token after a document's end."""
    objective: Literal["tokens", "samples"] = "tokens"
    """What has equal weight in the loss: each supervised token, or each sample (conversation)."""
    validation_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the embedded corpus, and of sources that are text, to hold out; a hash of each
    document decides."""
    max_epochs: float | None = Field(None, gt=0)
    """Largest number of passes over any source; absent: no limit."""
    verify_checksums: bool = False
    """Whether each start first reads all files of prepared folders and compares their checksums.
    Their sizes are always compared."""
    language_of: Literal["source", "script", "none"] = "none"
    """What says which language a token is: its source, the script of its letters, or nothing."""
    prefetch_steps: int = Field(2, ge=0)
    """Number of steps whose rows are read in advance, in the background; 0: none."""

    @property
    def blend(self) -> BlendConfig:
        """The sources with what belongs to them."""
        return BlendConfig(
            sources=self.sources,
            tiers=self.tiers,
            validation=self.validation,
            missing=self.missing,
        )

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        _ = self.blend  # checks names, tiers and groups
        check_lengths(self.lengths)
        return self


class ChatOptions(Section):
    """How conversations are read and rendered."""

    messages_column: str = "messages"
    """Column with the messages of a row."""
    tools_column: str = "tools"
    """Column with the functions that the assistant could call."""
    enable_thinking: bool = True
    """Whether reasoning is kept."""
    truncate_history_thinking: bool = True
    """Whether reasoning before the last user message is left out."""
    reasoning_off_rate: float = Field(0.0, ge=0, le=1)
    """Share of the conversations, chosen by a hash of each, that are written without reasoning."""
    reasoning_budget_rate: float = Field(0.0, ge=0, le=1)
    """Share whose reasoning is cut at the end of a random line, so that the answer is learned from
    a part of it; the part itself is not learned."""

    @model_validator(mode="after")
    def _check_rates(self) -> "ChatOptions":
        if self.reasoning_off_rate + self.reasoning_budget_rate > 1:
            rule = f"and reasoning_budget_rate = {self.reasoning_budget_rate:g} exceed 1 together"
            raise RuleBroken("reasoning_off_rate", f"{rule}; lower one", self.reasoning_off_rate)
        return self


class ChatSetConfig(ChatOptions):
    """How sources of conversations are prepared for a run."""

    max_bad_rows: int = Field(0, ge=0)
    """Rows of each source that may be unfit; they are left out."""


class PreferenceOptions(Section):
    """How pairs of answers are read and rendered."""

    prompt_column: str = "prompt"
    """Column with the messages before both answers, or with one question as text. A row without it
    has whole conversations as answers, which begin alike."""
    chosen_column: str = "chosen"
    """Column with the better answer: its messages, a whole conversation, or text."""
    rejected_column: str = "rejected"
    """Column with the other answer, in the same form."""
    tools_column: str = "tools"
    """Column with the functions that the assistant could call."""
    enable_thinking: bool = True
    """Whether reasoning is kept."""
    truncate_history_thinking: bool = True
    """Whether reasoning before the last user message is left out."""


class PreferenceSetConfig(PreferenceOptions):
    """How sources of pairs of answers are prepared for a run."""

    max_bad_rows: int = Field(0, ge=0)
    """Rows of each source that may be unfit; they are left out."""


class ConversationDataConfig(DataConfig):
    """What all kinds of conversations have: whole ones in each row, which do not see each other."""

    sources: Annotated[tuple[SourceConfig, ...], Field(strict=False, min_length=1)]
    """Files, folders or patterns of JSON lines or parquet, data sets of the hub (hf://OWNER/NAME)
    or prepared folders, with their weights."""
    packing: PackingConfig = PackingConfig(kind="best_fit", long_documents="drop")
    """How conversations are packed into rows; none is cut in two."""
    reset_documents: bool = True
    """Whether attention, convolution and state stop at the bounds of conversations."""
    validation_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the conversations to hold out; a hash of each decides."""


class ChatDataConfig(ConversationDataConfig):
    """Conversations whose answers are learned."""

    chat: ChatSetConfig = ChatSetConfig()
    """How conversations are read and rendered."""
    mask_correct: float = Field(0.0, ge=0, lt=1)
    """Share of the right tokens of a text to be corrected that are hidden in training, others in
    each pass; for conversations from `nemotron data pairs --as chat`."""


class PreferenceDataConfig(ConversationDataConfig):
    """Pairs of answers: both of a pair in one row, in which no answer sees another."""

    chat: PreferenceSetConfig = PreferenceSetConfig()
    """How pairs are read and rendered."""


def check_lengths(lengths: Sequence[LengthConfig]) -> None:
    """Raise ValueError if a row length is given twice."""
    sizes = [length.seq_len for length in lengths]
    for size in sizes:
        if sizes.count(size) > 1:
            raise RuleBroken("lengths", f"has seq_len = {size} twice; add their shares")
