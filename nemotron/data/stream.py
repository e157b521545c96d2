"""The documents of one side of a split as one long line of tokens."""

import numpy as np
from numpy.typing import NDArray

from nemotron.data.indexed import Shard


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
