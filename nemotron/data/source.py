"""One labelled source of rows: its documents end to end, cut into samples in a shuffled order."""

import logging
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from nemotron.data.config import DataConfig, SourceConfig
from nemotron.data.indexed import Shard
from nemotron.data.order import permute
from nemotron.data.prepare import open_shard, prepare_embedded
from nemotron.data.split import split_shard
from nemotron.data.tokenizer import Tokenizer
from nemotron.errors import UserError

log = logging.getLogger(__name__)


class Stream:
    """Documents of a shard, end to end; after the last comes the first again."""

    def __init__(self, shard: Shard, documents: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        """Take the documents' numbers and the tokens up to the end of each."""
        self.shard = shard
        self.documents = documents
        self.ends = ends
        self.num_tokens = int(ends[-1]) if len(ends) else 0

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Return `count` tokens from position `start` on, around the end if need be."""
        found = np.empty(count, np.int64)
        filled = 0
        while filled < count:
            position = (start + filled) % self.num_tokens
            place = int(np.searchsorted(self.ends, position, side="right"))
            document = self.shard.document(int(self.documents[place]))
            skipped = len(document) - (int(self.ends[place]) - position)
            piece = document[skipped : skipped + count - filled]
            found[filled : filled + len(piece)] = piece
            filled += len(piece)
        return found


class Source:
    """Documents to train on, cut into samples of one row, and documents held out.

    In each epoch the training stream is cut every `seq_len` tokens, from a place that only the
    seed, the source's name and the epoch decide; neighbouring samples share one token.
    """

    def __init__(
        self, config: SourceConfig, data: DataConfig, tokenizer: Tokenizer, *, seed: int, limit: int
    ) -> None:
        """Open the shard, preparing it first when it is an embedded domain.

        `limit` is the number that every id must be below.

        Raises:
            UserError: when the shard is unfit, too short, or holds an id that is too large.
        """
        self.name = config.name
        self.weight = config.weight
        self._seed = seed
        self._limit = limit
        self._seq_len = data.seq_len
        cache = Path(data.cache)
        prefix = config.prefix or prepare_embedded(config.name, cache, tokenizer, data.eod_token)
        self.shard = open_shard(prefix, tokenizer, eod_token=data.eod_token)
        split = split_shard(self.shard, data.validation_fraction, cache)
        self.contents = split.contents
        if not 0 <= self.contents.largest < limit:
            raise UserError(
                f"{self.shard.bin} holds the id {self.contents.largest} (document "
                f"{self.contents.largest_document}, position {self.contents.largest_position}), "
                f"but the vocabulary ends at {limit - 1}; use the tokenizer of this shard and a "
                "model.vocab_size that holds it."
            )
        self.train = Stream(self.shard, split.train, split.train_ends)
        self.validation = Stream(self.shard, split.validation, split.validation_ends)
        self.num_samples = self.train.num_tokens // data.seq_len
        if self.train.num_tokens <= data.seq_len:
            raise UserError(
                f"{self.shard.bin} has {self.train.num_tokens} tokens to train on; a row of "
                f"data.seq_len = {data.seq_len} takes {data.seq_len + 1}."
            )
        last = int(self.train.read(-1, 1)[0])
        if last != (eod_id := tokenizer.id(data.eod_token)):
            log.warning(
                "%s: a document ends with id %d, not with data.eod_token = %s (id %d); "
                "document boundaries may be missed",
                *(self.shard.prefix, last, data.eod_token, eod_id),
            )

    def place(self, row: int) -> tuple[int, int]:
        """Return epoch and sample of the source's row number `row`."""
        epoch, index = divmod(row, self.num_samples)
        return epoch, permute(index, self.num_samples, self._key(f"order/{epoch}"))

    def window(self, epoch: int, sample: int) -> NDArray[np.int64]:
        """Return the `seq_len + 1` tokens of a sample."""
        start = self._key(f"start/{epoch}") + sample * self._seq_len
        return self._checked(self.train.read(start % self.train.num_tokens, self._seq_len + 1))

    def held_out_windows(self, count: int) -> list[NDArray[np.int64]]:
        """Return up to `count` held-out windows in fixed order; the last one may be shorter."""
        tokens = self.validation.num_tokens
        starts = range(0, min(tokens - 1, count * self._seq_len), self._seq_len)
        lengths = [min(self._seq_len + 1, tokens - start) for start in starts]
        pairs = zip(starts, lengths, strict=True)
        return [self._checked(self.validation.read(*pair)) for pair in pairs]

    def _checked(self, window: NDArray[np.int64]) -> NDArray[np.int64]:
        if window.min() < 0 or window.max() >= self._limit:
            raise UserError(
                f"{self.shard.bin} holds ids outside 0 to {self._limit - 1} that were not there "
                "when it was first read; restore the file."
            )
        return window

    def _key(self, purpose: str) -> int:
        return xxhash.xxh64_intdigest(f"{self._seed}/{self.name}/{purpose}".encode())
