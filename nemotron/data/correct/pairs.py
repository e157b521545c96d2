"""A pair as a row of tokens: aligned candidates, the target, and what each token stands for.

In a shard, a row is a document of 2K+1 sequences: the K candidates as columns of equal length, the
target, and the K durations, each as long as the columns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from nemotron.data.indexed import Shard
from nemotron.errors import UserError

MOST_CANDIDATES = 16


@dataclass(frozen=True)
class PairRow:
    """A pair in token ids; K candidates lie in n columns, the target has m tokens."""

    columns: NDArray[np.int64]
    """[K, n] ids of the candidates, with `Marks.void` where a candidate has no token."""
    target: NDArray[np.int64]
    """[m] ids of the text that is right, without voids."""
    durations: NDArray[np.int64]
    """[K, n] number of target tokens that the token of each column stands for; 0 at a void. Each
    line sums to m, but for a candidate without any token, whose line is 0."""

    @property
    def num_candidates(self) -> int:
        return len(self.columns)

    @property
    def num_columns(self) -> int:
        return self.columns.shape[1]

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """[K, n] place in the target at which the tokens of each column begin."""
        return np.cumsum(self.durations, axis=1) - self.durations

    @cached_property
    def is_kept(self) -> NDArray[np.bool_]:
        """[K, n] whether a token is right: it stands for one target token, which is the same."""
        kept = self.durations == 1
        padded = np.append(self.target, -1)
        return kept & (padded[np.minimum(self.starts, len(self.target))] == self.columns)

    def target_of(self, candidate: int, column: int) -> NDArray[np.int64]:
        """Return the target tokens that one token of a candidate stands for."""
        start = int(self.starts[candidate, column])
        return self.target[start : start + int(self.durations[candidate, column])]

    def sequences(self) -> list[NDArray[np.int64]]:
        """Return the sequences of the document that holds the row."""
        return [*self.columns, self.target, *self.durations]


def row_of(sequences: Sequence[NDArray[np.integer]]) -> PairRow:
    """Return the row whose sequences these are.

    Raises:
        ValueError: when they are not the sequences of a row.
    """
    count = len(sequences) // 2
    lengths = {len(s) for number, s in enumerate(sequences) if number != count}
    if len(sequences) != 2 * count + 1 or count < 1 or len(lengths) != 1:
        raise ValueError(
            f"has {len(sequences)} sequences of {sorted(map(len, sequences))} tokens; a pair has "
            "2K+1, of which all but the target have one length"
        )
    whole = [np.asarray(sequence, np.int64) for sequence in sequences]
    return PairRow(np.stack(whole[:count]), whole[count], np.stack(whole[count + 1 :]))


def read_row(shard: Shard, number: int) -> PairRow:
    """Return the pair that a document of a shard holds.

    Raises:
        UserError: when the document is not a pair.
    """
    first, last = shard.documents[number : number + 2].tolist()
    lengths = np.asarray(shard.lengths[first:last], np.int64)
    ids = shard.document(number)
    try:
        return row_of(np.split(ids, np.cumsum(lengths)[:-1]))
    except ValueError as error:
        raise UserError(
            f"document {number} {error}; make pairs with `nemotron data pairs --as rows`.",
            where=str(shard.prefix),
        ) from None


def read_rows(shard: Shard) -> Iterator[PairRow]:
    """Yield all pairs of a shard, in order."""
    for number in range(shard.num_documents):
        yield read_row(shard, number)
