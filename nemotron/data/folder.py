"""Opening tokens: a folder that was prepared, a folder of Megatron's shards, or one shard."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import xxhash
from pydantic import Field, ValidationError, model_validator

from nemotron.data.config import DataConfig, SourceConfig
from nemotron.data.indexed import Shard, Stream
from nemotron.data.tokenizer import Tokenizer
from nemotron.errors import UserError
from nemotron.files import read_regular
from nemotron.section import Section

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1
"""Of the manifest."""
TOKENS_CHECKED = 1 << 22
"""Tokens of a source that are compared with the vocabulary when it is opened; the others are when
their row is read."""
SEQUENCES_CHECKED = 1 << 22
"""Sequences up to which the whole index of a source is checked when it is opened."""


class FileFacts(Section):
    """Size and content of a file."""

    bytes: int
    xxh128: str


class ShardFacts(Section):
    """One shard of a prepared folder."""

    name: str
    """Prefix inside the folder."""
    documents: int
    tokens: int
    files: dict[str, FileFacts]

    @model_validator(mode="after")
    def _check(self) -> "ShardFacts":
        for name in (self.name, *self.files):
            if name != Path(name).name or not name.startswith(self.name) or name.startswith("."):
                raise ValueError(f"{name!r} is not the plain name of a file inside the folder")
        return self


class Counts(Section):
    """What became of the rows that were read."""

    rows: int = 0
    """Rows, text files or conversations in the input, bad ones included."""
    documents: int = 0
    """Documents to train on."""
    tokens: int = 0
    """Their tokens, ends of documents included."""
    held_out_documents: int = 0
    held_out_tokens: int = 0
    text_bytes: int = 0
    """UTF-8 bytes of all documents."""
    empty: int = 0
    """Rows without any text, left out."""
    filtered: int = 0
    """Rows that a filter left out."""
    bad: int = 0
    """Rows that could not be read, left out."""
    unsupervised: int = 0
    """Conversations without a token to learn, left out."""
    repeated: int = 0
    """Pairs with too few candidates, whose first one stands in for those that are missing."""
    cut: int = 0
    """Pairs with more candidates than were asked for, of which the first were kept."""
    largest_id: int = -1

    def plus(self, other: "Counts") -> "Counts":
        """Return the counts of both."""
        mine, theirs = self.model_dump(), other.model_dump()
        summed = {key: mine[key] + theirs[key] for key in mine}
        return Counts(**summed | {"largest_id": max(self.largest_id, other.largest_id)})


class Manifest(Section):
    """What a prepared folder holds and what it was made from."""

    format: int
    tokenizer: str
    """Hash of the `tokenizer.json`."""
    eod_token: str
    eod_id: int
    validation_fraction: float
    inputs: Annotated[tuple[dict[str, Any], ...], Field(strict=False)]  # Any: what JSON holds
    """Files and data sets that were read, in order."""
    options: dict[str, Any]
    """Every option that changes the output."""
    counts: Counts
    bad_rows: Annotated[tuple[str, ...], Field(strict=False)]
    """The first rows that could not be read, with the reason."""
    train: Annotated[tuple[ShardFacts, ...], Field(strict=False)]
    validation: Annotated[tuple[ShardFacts, ...], Field(strict=False)]

    @property
    def form(self) -> Literal["texts", "chats", "pairs", "preferences"]:
        """What a document is: a text, a conversation, the sequences of a pair, or two answers."""
        if self.options.get("preferences") is not None:
            return "preferences"
        pairs = self.options.get("pairs") or {}
        if pairs.get("form") == "rows":
            return "pairs"
        return "chats" if pairs or self.options.get("chat") is not None else "texts"

    @property
    def content(self) -> str:
        """Hash of the checksums of all shards, in order."""
        shards = [shard.model_dump() for shard in (*self.train, *self.validation)]
        return xxhash.xxh128_hexdigest(json.dumps(shards).encode())


@dataclass(frozen=True)
class TokenSet:
    """Open tokens: those to train on and those held out."""

    path: Path
    train: Stream
    validation: Stream
    manifest: Manifest | None

    @property
    def identity(self) -> str:
        """A hash that changes when the tokens do."""
        return self.manifest.content if self.manifest else self.train.identity()


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a folder, or None where there is none.

    Raises:
        UserError: when it is damaged or of another format.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(read_regular(path))
        if isinstance(content, dict) and content.get("format") != FORMAT:
            rule, value = f"is unknown; this version reads {FORMAT}.", content.get("format")
            raise UserError(rule, key="format", value=value, where=str(path))
        return Manifest.model_validate(content)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValidationError, ValueError, RecursionError):
        raise UserError(
            "is not a manifest of prepared data; prepare the folder again, or remove the "
            "file to read its shards without one.",
            where=str(path),
        ) from None


def open_tokens(path: str | Path, tokenizer: Tokenizer, eod_token: str, limit: int) -> TokenSet:
    """Open what a source's `path` names; `limit` is the number that every id must be below.

    Raises:
        UserError: when there are no tokens, or they do not fit their manifest, the tokenizer, the
            end of documents or the vocabulary.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if manifest is None:
        train = Stream([Shard(prefix) for prefix in _prefixes(path)])
        found = TokenSet(path, train, Stream([]), None)
        _warn_of_other_ends(train, tokenizer.id(eod_token), eod_token)
    else:
        _check_manifest(path, manifest, tokenizer, eod_token, limit)
        streams = [Stream(_shards(path, side)) for side in (manifest.train, manifest.validation)]
        found = TokenSet(path, streams[0], streams[1], manifest)
    for stream in (found.train, found.validation):
        if sum(shard.num_sequences for shard in stream.shards) <= SEQUENCES_CHECKED:
            for shard in stream.shards:
                shard.check()
    if not found.train.num_tokens:
        raise UserError(
            "contains no tokens to train on; give shards that contain documents.",
            where=str(path.absolute()),
        )
    _check_first_tokens(found.train, limit)
    return found


def open_source(
    source: SourceConfig, config: DataConfig, tokenizer: Tokenizer, limit: int
) -> TokenSet:
    """Open a source that has a path, with its held-out tokens.

    Raises:
        UserError: when a shard is unfit.
    """
    assert source.path is not None, source.name
    opened = open_tokens(source.path, tokenizer, config.eod_token, limit)
    if source.validation is None:
        return opened
    beside = open_tokens(source.validation, tokenizer, config.eod_token, limit)
    held_out = Stream([*beside.train.shards, *beside.validation.shards])
    return TokenSet(opened.path, opened.train, held_out, opened.manifest)


def _warn_of_other_ends(stream: Stream, eod_id: int, eod_token: str) -> None:
    if stream.num_tokens and (last := int(stream.shards[-1].tokens[-1])) != eod_id:
        log.warning(
            "%s: a document ends with id %d, not with data.eod_token = %s (id %d); "
            "document boundaries may be missed",
            *(stream.shards[-1].prefix, last, eod_token, eod_id),
        )


def _prefixes(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(index.with_suffix("") for index in path.glob("*.idx"))
    if not found:
        raise UserError(
            f"contains neither {MANIFEST} nor shards (*.idx), nor text; "
            "give a prepared folder, a shard without its .bin or .idx ending, or a folder of text.",
            where=str(path.absolute()),
        )
    return found


def _shards(folder: Path, facts: tuple[ShardFacts, ...]) -> list[Shard]:
    shards = []
    for known in facts:
        shard = Shard(folder / known.name)
        if shard.num_tokens != known.tokens or shard.num_documents != known.documents:
            raise UserError(
                f"has {shard.num_documents} documents with {shard.num_tokens} "
                f"tokens, where {folder / MANIFEST} says {known.documents} with {known.tokens}; "
                "restore the shard or prepare the folder again.",
                where=str(shard.prefix),
            )
        for name, file in known.files.items():
            _check_size(folder / name, file.bytes)
        shards.append(shard)
    return shards


def _check_size(path: Path, size: int) -> None:
    found = f"has {path.stat().st_size} bytes" if path.is_file() else "does not exist"
    if found != f"has {size} bytes":
        raise UserError(
            f"{found}, but {MANIFEST} says {size} bytes; restore it or prepare the folder again.",
            where=str(path),
        )


def _check_manifest(
    path: Path, manifest: Manifest, tokenizer: Tokenizer, eod_token: str, limit: int
) -> None:
    where = str(path.absolute() / MANIFEST)
    if (known := manifest.tokenizer) != tokenizer.hash:
        rule = (
            f"is not that of data.tokenizer, {tokenizer.hash}; name the tokenizer.json of these "
            "shards."
        )
        raise UserError(rule, key="tokenizer", value=known, where=where)
    if (end := manifest.eod_id) != (own := tokenizer.id(eod_token)):
        rule = (
            f"is not the id of data.eod_token = {eod_token}, which is {own}; set data.eod_token to "
            "the token of the shards."
        )
        raise UserError(rule, key="eod_id", value=end, where=where)
    if (largest := manifest.counts.largest_id) >= limit:
        rule = (
            f"lies outside the vocabulary, which ends at {limit - 1}; use a larger "
            "model.vocab_size."
        )
        raise UserError(rule, key="counts.largest_id", value=largest, where=where)


def _check_first_tokens(stream: Stream, limit: int) -> None:
    """Compare the first tokens of every shard with the vocabulary."""
    share = TOKENS_CHECKED // max(1, len(stream.shards))
    for shard in stream.shards:
        # Without its sign a negative id, which no vocabulary has, is the largest of all.
        unsigned = shard.tokens[:share].astype(np.int64).view(np.uint64)
        if unsigned.size and unsigned.max() >= limit:
            at = int(unsigned.argmax())
            document = int(np.searchsorted(shard.starts(slice(None)), at, side="right")) - 1
            place = at - int(shard.starts(slice(document, document + 1))[0])
            raise UserError(
                f"contains the id {int(shard.tokens[at])} (document {document}, "
                "position "
                f"{place}), but the vocabulary ends at {limit - 1}; use the tokenizer of this "
                "shard and a larger model.vocab_size.",
                where=str(shard.bin),
            )
