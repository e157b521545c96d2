"""Documents to token ids: many short ones at once, a long one piece by piece."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from nemotron.data.prepare.read import Bad, Chunk
from nemotron.data.tokenizer import Tokenizer

LONG = 1 << 18
"""Characters from which a document is encoded in pieces."""
WINDOW = 1 << 16
"""Characters of a piece."""
BATCH_CHARACTERS = 1 << 17
"""Characters given to the tokenizer together."""
BATCH_DOCUMENTS = 256


@dataclass(frozen=True)
class Ids:
    """Token ids of a document, or a piece of them, and the UTF-8 bytes that they stand for.

    In conversations `learned` has the role of each id, as shards have it. `family` is what decides
    whether the document is held out: the same for all sequences of one conversation, and the target
    of a pair. `sequences` has the lengths of the sequences of a document that has several.
    """

    ids: list[int]
    num_bytes: int
    is_last: bool
    learned: list[int] | None = None
    family: list[int] | None = None
    sequences: list[int] | None = None


class LongDocument:
    """Encodes one document that comes in chunks; the ids are those of the whole text."""

    def __init__(self, tokenizer: Tokenizer, window: int = WINDOW) -> None:
        self._tokenizer = tokenizer
        self._window = self._first_window = window
        self._rest = ""

    def feed(self, text: str) -> Iterator[Ids]:
        """Yield the ids of all text that nothing to come can change any more."""
        self._rest += text
        start = 0
        while len(self._rest) - start >= self._window:
            part = self._rest[start : start + self._window]
            ids, length = self._tokenizer.encode_start(part)
            if not length:
                self._window *= 2
                continue
            yield Ids(ids, len(part[:length].encode()), is_last=False)
            start += length
            self._window = self._first_window
        self._rest = self._rest[start:]

    def finish(self) -> Ids:
        """Return the ids of what is left."""
        return Ids(self._tokenizer.encode(self._rest), len(self._rest.encode()), is_last=True)


def encode_documents(chunks: Iterable[Chunk | Bad], tokenizer: Tokenizer) -> Iterator[Ids | Bad]:
    """Yield the ids of each document, in order; those of a long document in several parts."""
    waiting: list[str] = []
    characters = 0
    open_document: LongDocument | None = None
    for chunk in chunks:
        if isinstance(chunk, Bad):
            yield from _encode_batch(waiting, tokenizer)
            waiting, characters, open_document = [], 0, None
            yield chunk
            continue
        if open_document is None and chunk.is_last and len(chunk.text) < LONG:
            waiting.append(chunk.text)
            characters += len(chunk.text)
            if characters >= BATCH_CHARACTERS or len(waiting) >= BATCH_DOCUMENTS:
                yield from _encode_batch(waiting, tokenizer)
                waiting, characters = [], 0
            continue
        yield from _encode_batch(waiting, tokenizer)
        waiting, characters = [], 0
        open_document = open_document or LongDocument(tokenizer)
        yield from open_document.feed(chunk.text)
        if chunk.is_last:
            yield open_document.finish()
            open_document = None
    yield from _encode_batch(waiting, tokenizer)


def _encode_batch(texts: list[str], tokenizer: Tokenizer) -> Iterator[Ids]:
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        yield Ids(ids, len(text.encode()), is_last=True)
