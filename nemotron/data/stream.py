"""The tokens of many shards as one line of text that begins again at its end."""

from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from nemotron.data.indexed import Shard
from nemotron.errors import UserError

ENDS_READ = 4096
"""Bytes at either end of a shard's files that its identity hangs on, besides their sizes."""


class Stream:
    """Shards end to end; positions count tokens from the first one on."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        """Take open shards; empty ones are left out.

        Raises:
            UserError: when some shards hold conversations and others do not.
        """
        self.shards = [shard for shard in shards if shard.num_tokens]
        self.ends = np.cumsum([0, *(shard.num_tokens for shard in self.shards)])[1:]
        self.num_tokens = int(self.ends[-1]) if self.shards else 0
        self.num_documents = sum(shard.num_documents for shard in self.shards)
        supervised = [shard.is_supervised for shard in self.shards]
        self.is_supervised = any(supervised)
        if self.is_supervised and not all(supervised):
            missing = self.shards[supervised.index(False)].loss
            raise UserError(f"{missing} is missing, but other shards have theirs; prepare again.")

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Return `count` tokens from a position on, around the end if need be.

        Raises:
            UserError: when a shard was changed since it was opened.
        """
        found = np.empty(count, np.int64)
        for number, here, into in self._pieces(start, count):
            self.shards[number].check_unchanged()
            found[into] = self.shards[number].tokens[here]
        return found

    def read_learned(self, start: int, count: int) -> NDArray[np.bool_]:
        """Return for each of these tokens whether it is learned: all of them, but in chats."""
        found = np.ones(count, np.bool_)
        if self.is_supervised:
            for number, here, into in self._pieces(start, count):
                found[into] = self.shards[number].learned[here]
        return found

    def _pieces(self, start: int, count: int) -> list[tuple[int, slice, slice]]:
        """Return shard, place in the shard and place in the answer of each piece."""
        pieces, filled = [], 0
        while filled < count:
            position = (start + filled) % self.num_tokens
            number = int(np.searchsorted(self.ends, position, side="right"))
            shard = self.shards[number]
            at = position - (int(self.ends[number]) - shard.num_tokens)
            length = min(shard.num_tokens - at, count - filled)
            pieces.append((number, slice(at, at + length), slice(filled, filled + length)))
            filled += length
        return pieces

    def identity(self) -> str:
        """Return a hash of the files' sizes and of their first and last bytes."""
        digest = xxhash.xxh128()
        for shard in self.shards:
            for path in (shard.bin, shard.idx):
                with open(path, "rb") as file:
                    size = file.seek(0, 2)
                    digest.update(size.to_bytes(8, "little"))
                    for at in (0, max(0, size - ENDS_READ)):
                        file.seek(at)
                        digest.update(file.read(ENDS_READ))
        return digest.hexdigest()
