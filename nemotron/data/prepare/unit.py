"""One unit of work: its rows become a shard to train on and a shard that is held out."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from nemotron.data.folder import Counts, FileFacts, ShardFacts
from nemotron.data.indexed import LEARNED
from nemotron.data.prepare.conversations import (
    HALF_CHARACTER,
    encode_conversation,
    is_unicode,
    without_nulls,
)
from nemotron.data.prepare.encode import Ids, encode_documents
from nemotron.data.prepare.inputs import Piece, Unit
from nemotron.data.prepare.options import PrepareOptions, parse_filter
from nemotron.data.prepare.pairs import PairEncoder
from nemotron.data.prepare.preferences import encode_preference
from nemotron.data.prepare.read import Bad, Chunk, Place, Tick, no_column, read_rows, read_text
from nemotron.data.prepare.writer import ShardWriter, id_type
from nemotron.data.tokenizer import Tokenizer
from nemotron.files import hash_file
from nemotron.section import Section

HASHED = 1 << 18
"""Tokens of a document whose hash decides whether it is held out."""
BAD_ROWS_NAMED = 20
NO_IDS = np.empty(0, np.int32)

TRAIN, VALIDATION = "train", "validation"

Kept = tuple[Place, Mapping[str, Any]]  # Any: what a row holds
Encode = Callable[[Mapping[str, Any]], list[Ids]]
"""Returns the documents of a row, or raises ValueError."""


class Receipt(Section):
    """What a finished unit wrote."""

    counts: Counts
    bad_rows: tuple[str, ...]
    train: ShardFacts | None
    validation: ShardFacts | None


class Tally:
    """Counts while a unit is read."""

    def __init__(self, on_bad: Callable[[str], None]) -> None:
        self.counts = dict.fromkeys(Counts.model_fields, 0) | {"largest_id": -1}
        self.bad_rows: list[str] = []
        self._on_bad = on_bad

    def count(self, what: str) -> None:
        self.counts[what] += 1

    def bad(self, row: Bad) -> None:
        self.counts["bad"] += 1
        # receipts and terminals take neither surrogates nor control characters
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in f"{row.where} {row.why}")
        if len(self.bad_rows) < BAD_ROWS_NAMED:
            self.bad_rows.append(text)
        self._on_bad(text)


def write_unit(
    unit: Unit,
    folder: Path,
    tokenizer: Tokenizer,
    options: PrepareOptions,
    tick: Tick,
    on_bad: Callable[[str], None],
) -> Receipt:
    """Write the shards of a unit; either all of their files appear or none counts.

    `on_bad` is called for each bad row at once, and may raise to stop.
    """
    tally = Tally(on_bad)
    if not options.adds_ends:
        encode = _encoder(tokenizer, options, tally)
        documents = _encoded(unit, encode, options, tick, tally)
        return write_documents(documents, folder, unit.number, tokenizer, options, tally)
    chunks = (chunk for piece in unit.pieces for chunk in read_chunks(piece, options, tick, tally))
    encoded = _good(encode_documents(chunks, tokenizer), tally)
    return write_documents(encoded, folder, unit.number, tokenizer, options, tally)


def write_texts(
    texts: Iterable[str], folder: Path, tokenizer: Tokenizer, options: PrepareOptions
) -> Receipt:
    """Write documents that are at hand as unit 0."""
    tally = Tally(lambda text: None)
    encoded = _good(encode_documents((Chunk(t, True) for t in texts), tokenizer), tally)
    return write_documents(encoded, folder, 0, tokenizer, options, tally)


def write_documents(
    parts: Iterable[Ids],
    folder: Path,
    number: int,
    tokenizer: Tokenizer,
    options: PrepareOptions,
    tally: Tally,
) -> Receipt:
    """Write encoded documents, some in several parts.

    Each ends with the end of document, but for conversations, which have ends of their own, and
    pairs, which have none.
    """
    counts = tally.counts
    ends = [tokenizer.id(options.eod_token)] if options.adds_ends else []
    eod = np.asarray(ends, np.int32)
    dtype = id_type(tokenizer.vocab_size)
    with ExitStack() as stack:
        train, validation = (
            stack.enter_context(
                ShardWriter(
                    folder / f"{side}-{number:05d}", dtype, supervised=options.is_supervised
                )
            )
            for side in (TRAIN, VALIDATION)
        )
        chosen: ShardWriter | None = None
        held = NO_IDS  # of the open document, until it is known to which side it belongs
        for part in parts:
            counts["text_bytes"] += part.num_bytes
            held = np.concatenate([held, np.asarray(part.ids, np.int32)])
            if part.is_last and chosen is None and not len(held):
                counts["empty"] += 1
                continue
            if part.is_last:
                held = np.concatenate([held, eod])
            if chosen is None and (part.is_last or len(held) >= HASHED):
                family = held if part.family is None else np.asarray(part.family, np.int32)
                held_out = _is_held_out(family, options.validation_fraction)
                chosen = validation if held_out else train
            if chosen is not None:
                counts["largest_id"] = max(counts["largest_id"], int(held.max(initial=-1)))
                _extend(chosen, held, part)
                held = NO_IDS
                if part.is_last:
                    chosen.end_document()
                    chosen = None
    counts["documents"], counts["tokens"] = len(train.lengths), sum(train.lengths)
    counts["held_out_documents"] = len(validation.lengths)
    counts["held_out_tokens"] = sum(validation.lengths)
    return Receipt(
        counts=Counts(**counts),
        bad_rows=tuple(tally.bad_rows),
        train=_facts(train),
        validation=_facts(validation),
    )


def _extend(writer: ShardWriter, ids: NDArray[np.int32], part: Ids) -> None:
    """Append ids to the open document; a document of several sequences is whole."""
    if part.sequences is None:
        writer.extend(ids, part.learned)
        return
    for sequence in np.split(ids, np.cumsum(part.sequences)[:-1]):
        writer.extend(sequence)
        writer.end_sequence()


def _is_held_out(ids: NDArray[np.int32], fraction: float) -> bool:
    """Decide by the document's own ids: neither its place nor the other documents matter."""
    digest = xxhash.xxh64_intdigest(ids.astype("<i4").tobytes())
    return digest < fraction * 2**64


def _facts(writer: ShardWriter) -> ShardFacts | None:
    """Describe a finished shard; one without documents is removed."""
    if not writer.lengths:
        for path in writer.files.values():
            path.unlink()
        return None
    return ShardFacts(
        name=writer.prefix.name,
        documents=len(writer.lengths),
        tokens=sum(writer.lengths),
        files={
            path.name: FileFacts(bytes=path.stat().st_size, xxh128=hash_file(path))
            for path in writer.files.values()
        },
    )


def read_chunks(
    piece: Piece, options: PrepareOptions, tick: Tick, tally: Tally
) -> Iterator[Chunk | Bad]:
    """Yield the texts of a piece; rows that a filter leaves out are counted."""
    if piece.kind == "text":
        yield from _counted(read_text(piece, options.separator, tick), tally)
        return
    for place, row in _rows(piece, options, tick, tally):
        text = row.get(options.column)
        if isinstance(text, str) and not is_unicode(text):
            tally.bad(Bad(place(), f"has a {options.column} with {HALF_CHARACTER}"))
        elif isinstance(text, str):
            yield Chunk(text, is_last=True)
        elif options.column in row:
            tally.bad(Bad(place(), f"has a {options.column} that is not text"))
        else:
            tally.bad(Bad(place(), no_column(options.column, row)))


def _rows(piece: Piece, options: PrepareOptions, tick: Tick, tally: Tally) -> Iterator[Kept]:
    """Yield the rows that pass every filter."""
    filters = [parse_filter(text) for text in options.filters]
    for found in read_rows(piece, options, tick):
        tally.counts["rows"] += 1
        if isinstance(found, Bad):
            tally.bad(found)
        elif all(condition.passes(found[1]) for condition in filters):
            yield found
        else:
            tally.counts["filtered"] += 1


def _counted(chunks: Iterable[Chunk | Bad], tally: Tally) -> Iterator[Chunk | Bad]:
    for chunk in chunks:
        tally.counts["rows"] += isinstance(chunk, Bad) or chunk.is_last
        yield chunk


def _good(encoded: Iterable[Ids | Bad], tally: Tally) -> Iterator[Ids]:
    for part in encoded:
        if isinstance(part, Bad):
            tally.bad(part)
        else:
            yield part


def _encoder(tokenizer: Tokenizer, options: PrepareOptions, tally: Tally) -> Encode:
    """Return what encodes the rows of conversations, of pairs or of pairs of answers."""
    if options.pairs is not None:
        pairs = PairEncoder(tokenizer, options.pairs)
        return partial(pairs.encode, count=tally.count)
    if options.preferences is not None:
        return partial(
            encode_preference, tokenizer=tokenizer, options=options.preferences, count=tally.count
        )
    assert options.chat is not None
    return partial(encode_conversation, tokenizer=tokenizer, options=options.chat)


def _encoded(
    unit: Unit, encode: Encode, options: PrepareOptions, tick: Tick, tally: Tally
) -> Iterator[Ids]:
    """Yield the documents of every row, such as the training sequences of conversations."""
    for piece in unit.pieces:
        for place, row in _rows(piece, options, tick, tally):
            if piece.kind != "jsonl":
                row = {name: without_nulls(value) for name, value in row.items()}
            try:
                sequences = encode(row)
            except (ValueError, TypeError) as error:
                tally.bad(Bad(place(), str(error)))
                continue
            except RecursionError:
                tally.bad(Bad(place(), "is nested too deep"))
                continue
            for sequence in sequences:
                if sequence.learned is None or LEARNED in sequence.learned:
                    yield replace(sequence, family=sequence.family or sequences[0].ids)
                else:
                    tally.counts["unsupervised"] += 1
