"""Where the text comes from and how it becomes rows."""

from typing import Annotated

from pydantic import Field, model_validator

from nemotron.section import Section

EMBEDDED_DOMAINS = ("code", "docs", "verse")
"""Labelled domains of the corpus that ships with the package."""


class SourceConfig(Section):
    """One labelled stream of documents."""

    name: str = Field(min_length=1)
    """Label in metrics; without `prefix`, a domain of the embedded corpus: code, docs or verse."""
    weight: float = Field(1.0, gt=0)
    """Share of the training tokens, relative to the other sources."""
    prefix: str | None = None
    """Path of a Megatron shard without its `.bin` / `.idx` ending."""


class DataConfig(Section):
    """Sources, tokenizer and rows."""

    sources: Annotated[tuple[SourceConfig, ...], Field(strict=False, min_length=1)] = (
        SourceConfig(name="code", weight=0.5),
        SourceConfig(name="docs", weight=0.3),
        SourceConfig(name="verse", weight=0.2),
    )
    """What is read, in which proportion."""
    tokenizer: str = "embedded"
    """`embedded` (the byte-level BPE of the package) or the path of a `tokenizer.json`."""
    eod_token: str = Field("</s>", min_length=1)
    """Token that ends each document in the shards."""
    cache: str = "runs/.cache"
    """Folder for the token shards made from the embedded corpus, and for validation splits."""
    seq_len: int = Field(512, gt=1)
    """Tokens in a row."""
    reset_documents: bool = False
    """Whether attention, convolution and state stop at document boundaries inside a row."""
    mask_eod_loss: bool = False
    """Whether the prediction of the token after an end of document is left out of the loss."""
    validation_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of documents, chosen by their hash, that are held out for validation."""
    max_epochs: float | None = Field(None, gt=0)
    """Passes over any one source beyond which the run is refused; absent: no limit."""

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"sources names {name!r} twice; give each source its own name")
        for source in self.sources:
            if source.prefix is None and source.name not in EMBEDDED_DOMAINS:
                raise ValueError(
                    f"sources: {source.name!r} has no prefix and is no embedded domain; "
                    f"add the shard's prefix or use {', '.join(EMBEDDED_DOMAINS)}"
                )
        return self
