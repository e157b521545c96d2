"""The pairs of one source: an order of them for each pass, and those that are held out."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from nemotron.data.correct.pairs import PairRow, read_row
from nemotron.data.folder import TokenSet
from nemotron.data.indexed import Shard, Stream
from nemotron.data.source import permute
from nemotron.errors import UserError
from nemotron.posttrain.correct.config import CorrectConfig
from nemotron.posttrain.correct.layout import least_length

MOST_TOO_LONG = 0.01
"""Share of the pairs that may be longer than a row."""


class Pairs:
    """The pairs of shards, by number."""

    def __init__(self, stream: Stream) -> None:
        self.shards = stream.shards
        self._ends = np.cumsum([shard.num_documents for shard in stream.shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, number: int) -> PairRow:
        at = int(np.searchsorted(self._ends, number, side="right"))
        shard = self.shards[at]
        return read_row(shard, number - (int(self._ends[at]) - shard.num_documents))


class PairSource:
    """The pairs of one source to train on; a pass has an order of its own."""

    def __init__(self, name: str, tokens: TokenSet, config: CorrectConfig) -> None:
        """Check the lengths of all pairs, and the number of candidates.

        Raises:
            UserError: when pairs have another number of candidates than the model, or too many of
                them are longer than a row.
        """
        self.name = name
        self.pairs = Pairs(tokens.train)
        self.held_out = Pairs(tokens.validation)
        self.identity = tokens.identity
        self._seed = config.seed
        for shard in (*self.pairs.shards, *self.held_out.shards):
            check_candidates(shard, config.model.num_candidates)
        _check_lengths(self.pairs.shards, tokens.path, config)

    def pair(self, number: int) -> tuple[PairRow, np.random.Generator]:
        """Return the pair that comes after `number` others, and the source of its random bits."""
        epoch, index = divmod(number, len(self.pairs))
        sample = permute(index, len(self.pairs), self._key(f"order/{epoch}"))
        random = np.random.default_rng(self._key(f"random/{epoch}/{sample}"))
        return self.pairs[sample], random

    def _key(self, purpose: str) -> int:
        return xxhash.xxh64_intdigest(f"{self._seed}/{self.name}/{purpose}".encode())


def check_candidates(shard: Shard, candidates: int) -> None:
    """Check that the pairs of a shard have as many candidates as the model reads.

    Raises:
        UserError: when they have not.
    """
    if not shard.num_documents:
        return
    if (count := read_row(shard, 0).num_candidates) != candidates:
        raise UserError(
            f"has {count} candidates a pair, but model.correction.candidates = "
            f"{candidates}; write candidates: {count}, or make the pairs with --candidates "
            f"{candidates}.",
            where=str(shard.prefix),
        )


def _check_lengths(shards: Sequence[Shard], path: Path, config: CorrectConfig) -> None:
    lengths = np.concatenate([_least_lengths(shard, config) for shard in shards])
    if not len(lengths):
        raise UserError(f"{path} has no pairs to train on; give it more.", key="data.sources")
    if (too_long := int((lengths > config.data.seq_len).sum())) > MOST_TOO_LONG * len(lengths):
        raise UserError(
            f"is too short for {too_long} of {len(lengths)} pairs of {path}; {lengths.max()} would "
            "do.",
            key="data.seq_len",
            value=config.data.seq_len,
        )


def _least_lengths(shard: Shard, config: CorrectConfig) -> np.ndarray:
    """Return the fewest tokens that each pair takes in a row."""
    firsts = np.asarray(shard.documents[:-1])
    columns = np.asarray(shard.lengths)[firsts].astype(np.int64)
    targets = np.asarray(shard.lengths)[firsts + config.model.num_candidates].astype(np.int64)
    pairs = zip(columns.tolist(), targets.tolist(), strict=True)
    return np.array([least_length(n, m, config.correct) for n, m in pairs], np.int64)
