"""Where the text comes from, how it is blended and how it becomes rows."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from nemotron.section import Section

EMBEDDED_DOMAINS = ("code", "docs", "verse")
"""Labelled domains of the corpus that ships with the package."""


class SourceConfig(Section):
    """One labelled stream of documents, or a group of them that share a weight."""

    name: str = Field(min_length=1)
    """Label in metrics; without `path`, a domain of the embedded corpus: code, docs or verse."""
    weight: float = Field(1.0, gt=0)
    """Share of the training tokens, relative to the other sources of its group."""
    path: str | None = None
    """Folder that `nemotron data prepare` wrote, folder of Megatron shards, or one shard."""
    validation: str | None = None
    """Held-out tokens of a source whose `path` has none; a path of the same kinds."""
    tier: str | None = None
    """Quality tier, a key of `tiers`, whose factor multiplies the weight."""
    max_epochs: float | None = Field(None, gt=0)
    """Passes over this source beyond which the run is refused; absent: `data.max_epochs`."""
    sources: Annotated[tuple["SourceConfig", ...], Field(strict=False)] = ()
    """Members of a group; it has no path of its own."""


class ValidationConfig(Section):
    """A set of documents that is only evaluated."""

    name: str = Field(min_length=1)
    """Label in metrics."""
    path: str
    """Prepared folder, folder of Megatron shards, or one shard; all of it is held out."""


class MissingConfig(Section):
    """A category of the original mixture that this blend does not have."""

    name: str = Field(min_length=1)
    """What is missing."""
    weight: float = Field(gt=0)
    """Weight that it had; shown by `nemotron data plan`, never given to other sources."""


class BlendConfig(Section):
    """What is read, in which proportion."""

    sources: Annotated[tuple[SourceConfig, ...], Field(strict=False, min_length=1)]
    """Sources and groups of sources."""
    tiers: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Factor of the weight of each quality tier."""
    validation: Annotated[tuple[ValidationConfig, ...], Field(strict=False)] = ()
    """Documents that are evaluated beside those held out of the sources."""
    missing: Annotated[tuple[MissingConfig, ...], Field(strict=False)] = ()
    """Categories of the original mixture that are not there."""

    @model_validator(mode="after")
    def _check(self) -> "BlendConfig":
        names = [leaf.source.name for leaf in leaves(self)]
        names += [extra.name for extra in self.validation]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"sources names {twice!r} twice; give each source its own name")
        return self


class Leaf(Section):
    """A source of a blend with its share of the tokens and where it stands."""

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
            raise ValueError(
                f"sources: the tier {source.tier!r} of {source.name!r} is no key of tiers "
                f"({known}); add its factor there"
            )
        weight = source.weight * (1.0 if source.tier is None else tiers[source.tier])
        if source.sources:
            if source.path is not None:
                raise ValueError(
                    f"sources: {source.name!r} has a path and members; move the path to a member"
                )
            inner = list(_leaves(source.sources, tiers, 1.0, group or source.name))
            whole = sum(leaf.weight for leaf in inner)
            for leaf in inner:
                share = factor * weight * leaf.weight / whole
                yield leaf.model_copy(update={"weight": share})
            continue
        if source.path is None and source.name not in EMBEDDED_DOMAINS:
            raise ValueError(
                f"sources: {source.name!r} has no path and is no embedded domain; "
                f"add the path of its shards or use {', '.join(EMBEDDED_DOMAINS)}"
            )
        yield Leaf(source=source, weight=factor * weight, group=group)


class PackingConfig(Section):
    """How documents become rows."""

    kind: Literal["concatenate", "sequential", "best_fit"] = "concatenate"
    """End to end and cut at each row's end; whole into the open row; or where they fit best."""
    long_documents: Literal["split", "drop", "truncate"] = "split"
    """What becomes of a document longer than a row (kinds sequential and best_fit)."""


class LengthConfig(Section):
    """One of several lengths of row that alternate from step to step."""

    seq_len: int = Field(gt=1)
    """Tokens in a row; a step has as many tokens as with any other length."""
    share: float = Field(gt=0)
    """Share of the steps, relative to the other lengths."""
    blend: BlendConfig | None = None
    """What these rows are made of; absent: what the phase reads."""


class DataConfig(Section):
    """Sources, tokenizer and rows."""

    sources: Annotated[tuple[SourceConfig, ...], Field(strict=False, min_length=1)] = (
        SourceConfig(name="code", weight=0.5),
        SourceConfig(name="docs", weight=0.3),
        SourceConfig(name="verse", weight=0.2),
    )
    """What is read, in which proportion."""
    tiers: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Factor of the weight of each quality tier."""
    validation: Annotated[tuple[ValidationConfig, ...], Field(strict=False)] = ()
    """Documents that are evaluated beside those held out of the sources."""
    missing: Annotated[tuple[MissingConfig, ...], Field(strict=False)] = ()
    """Categories of the original mixture that are not there."""
    tokenizer: str = "embedded"
    """`embedded` (the byte-level BPE of the package) or the path of a `tokenizer.json`."""
    eod_token: str = Field("</s>", min_length=1)
    """Token that ends each document in the shards."""
    cache: str = "runs/.cache"
    """Folder for the shards made from the embedded corpus, and for plans of packed rows."""
    seq_len: int = Field(512, gt=1)
    """Tokens in a row; validation keeps this length in every phase."""
    lengths: Annotated[tuple[LengthConfig, ...], Field(strict=False)] = ()
    """Lengths of row that alternate from step to step; absent: all rows have `seq_len`."""
    packing: PackingConfig = PackingConfig()
    """How documents become rows."""
    reset_documents: bool = False
    """Whether attention, convolution and state stop at document boundaries inside a row."""
    mask_eod_loss: bool = False
    """Whether the prediction of the token after an end of document is left out of the loss."""
    objective: Literal["tokens", "samples"] = "tokens"
    """What each loss counts alike: every supervised token, or every sample (conversation)."""
    validation_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the embedded corpus, chosen by hash of the documents, that is held out."""
    max_epochs: float | None = Field(None, gt=0)
    """Passes over any one source beyond which the run is refused; absent: no limit."""
    prefetch_steps: int = Field(2, ge=0)
    """Steps whose rows are read ahead in the background; 0: none."""

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


def check_lengths(lengths: Sequence[LengthConfig]) -> None:
    """Raise ValueError when a length of row is given twice."""
    sizes = [length.seq_len for length in lengths]
    for size in sizes:
        if sizes.count(size) > 1:
            raise ValueError(f"lengths has seq_len = {size} twice; add their shares")
