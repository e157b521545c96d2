"""The rows of one source: a shuffled order of them for each pass, computed for any row."""

import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from nemotron.data.batch import Row
from nemotron.data.config import DataConfig, PreferenceDataConfig
from nemotron.data.folder import TokenSet
from nemotron.data.indexed import LEARNED, REJECTED, RIGHT, Stream
from nemotron.data.packing import RowPlan, plan_rows
from nemotron.errors import UserError

log = logging.getLogger(__name__)

ROUNDS = 6
"""Of the network that shuffles; two rounds are far from uniform, a test says."""


@dataclass(frozen=True)
class Mask:
    """Hides right tokens of a source that is to be corrected, others in each pass."""

    token: int
    rate: float

    def hide(
        self, tokens: NDArray[np.int64], roles: NDArray[np.uint8], key: int
    ) -> NDArray[np.int64]:
        """Return the tokens of a row with some that have the role `RIGHT` hidden."""
        drawn = np.random.default_rng(key).random(len(tokens)) < self.rate
        return np.where(drawn & (roles == RIGHT), self.token, tokens)


@dataclass(frozen=True)
class RowReader:
    """Makes rows of up to `seq_len + 1` tokens from a stream; `plan` for rows of whole documents.

    `limit` is the number that every id must be below; `per_sample` weighs each document's learned
    tokens to 1 in all. With `answers` a document is a pair of answers, which become two.
    """

    stream: Stream
    seq_len: int
    limit: int
    plan: RowPlan | None
    per_sample: bool
    answers: bool = False

    def window(self, start: int, count: int) -> Row:
        """Return `count` tokens of the stream from a position on."""
        tokens = self._checked(self.stream.read(start, count))
        if not self.stream.is_supervised:
            return Row(tokens)
        return Row(tokens, None, self.stream.read_learned(start, count).astype(np.float32))

    def planned(self, number: int, mask: Mask | None = None, key: int = 0) -> Row:
        """Return a row of whole documents; `key` seeds what the mask hides."""
        assert self.plan is not None
        pieces = self.plan.pieces(number)
        tokens = np.concatenate([self.stream.read(*piece) for piece in pieces])
        if mask is not None:
            roles = np.concatenate([self.stream.read_roles(*piece) for piece in pieces])
            tokens = mask.hide(tokens, roles, key)
        if self.answers:
            return self._pairs(self._checked(tokens), pieces)
        starts = np.cumsum([0, *(length for _, length in pieces)])[:-1]
        if not (self.stream.is_supervised or self.per_sample):
            return Row(self._checked(tokens), starts)
        weights = [self._weights(*piece) for piece in pieces]
        return Row(self._checked(tokens), starts, np.concatenate(weights))

    def _pairs(self, tokens: NDArray[np.int64], pieces: list[tuple[int, int]]) -> Row:
        """Return a row of pairs: the chosen and the rejected answer of each are two documents."""
        roles = np.concatenate([self.stream.read_roles(*piece) for piece in pieces])
        places = np.concatenate([np.arange(start, start + length) for start, length in pieces])
        is_rejected = roles & REJECTED
        starts = np.flatnonzero(np.diff(is_rejected, prepend=REJECTED))
        weights = (roles & ~np.uint8(REJECTED) == LEARNED).astype(np.float32)
        return Row(tokens, starts, weights, places)

    def _weights(self, start: int, length: int) -> NDArray[np.float32]:
        weights = self.stream.read_learned(start, length).astype(np.float32)
        weights[0] = 0  # the first token of a document is not a label
        return weights / max(1.0, float(weights.sum())) if self.per_sample else weights

    def _checked(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        if tokens.min() < 0 or tokens.max() >= self.limit:
            wrong = tokens[(tokens < 0) | (tokens >= self.limit)][0]
            raise UserError(
                f"contains the id {wrong}, but the vocabulary "
                "ends "
                f"at {self.limit - 1}; restore the shards, or use their tokenizer and a "
                "larger model.vocab_size.",
                where=str(self.stream.shards[0].bin.parent),
            )
        return tokens


class Source:
    """The rows of one length of one source.

    Of documents end to end, each pass is cut every `seq_len` tokens, from a place that only the
    seed, the source's name and the pass decide; neighboring rows share one token.
    """

    def __init__(
        self,
        name: str,
        tokens: TokenSet,
        data: DataConfig,
        seq_len: int,
        *,
        seed: int,
        limit: int,
        mask: Mask | None = None,
    ) -> None:
        """Plan the rows; `limit` is the number that every id must be below.

        Raises:
            UserError: when the source has no whole row, or packing does not fit its documents.
        """
        self.name = name
        self.seq_len = seq_len
        self._seed = seed
        self._reader = row_reader(name, tokens.train, lambda: tokens.identity, data, seq_len, limit)
        self._mask = mask
        plan = self._reader.plan
        available = tokens.train.num_tokens
        # the window of the last row may end at the first token again
        self.num_rows = available // seq_len if plan is None else len(plan.row_ends)
        if plan is not None and available and not self.num_rows:
            raise UserError(
                f"drops all {plan.counts.documents} documents of {name}, as none fits into a row "
                f"of data.seq_len = {seq_len}; use longer rows, or long_documents: truncate.",
                key="data.packing",
            )
        if not self.num_rows or (plan is None and available <= seq_len):
            raise UserError(
                f"has {available} tokens to train on, but a row of data.seq_len = {seq_len} takes "
                f"{seq_len + 1}; give more text, or shorten the rows.",
                where=f"{name} ({tokens.path})",
            )

    @property
    def packing(self) -> str | None:
        """What packing made of the documents, in words; None for rows cut from end to end."""
        plan = self._reader.plan
        return None if plan is None else plan.counts.describe(self.seq_len + 1)

    def place(self, row: int) -> tuple[int, int]:
        """Return pass and sample of the source's row number `row`."""
        epoch, index = divmod(row, self.num_rows)
        return epoch, permute(index, self.num_rows, self._key(f"order/{epoch}"))

    def row(self, epoch: int, sample: int) -> Row:
        """Return a sample of a pass.

        Raises:
            UserError: when a shard was changed since it was opened, or holds an id too large.
        """
        if self._reader.plan is not None:
            if self._mask is None:
                return self._reader.planned(sample)
            return self._reader.planned(sample, self._mask, self._key(f"mask/{epoch}/{sample}"))
        start = self._key(f"start/{epoch}") + sample * self.seq_len
        return self._reader.window(start % self._reader.stream.num_tokens, self.seq_len + 1)

    def _key(self, purpose: str) -> int:
        return xxhash.xxh64_intdigest(f"{self._seed}/{self.name}/{purpose}".encode())


class HeldOut:
    """Rows of documents that are never trained on, always the same ones."""

    def __init__(self, name: str, stream: Stream, data: DataConfig, limit: int) -> None:
        self._seq_len = data.seq_len
        self._reader = row_reader(name, stream, stream.identity, data, data.seq_len, limit)

    @property
    def num_rows(self) -> int:
        """All rows; none where packing drops every document."""
        plan, tokens = self._reader.plan, self._reader.stream.num_tokens
        return len(plan.row_ends) if plan is not None else -(-max(0, tokens - 1) // self._seq_len)

    def planned(self, number: int) -> Row:
        """Return one of its rows of whole documents."""
        return self._reader.planned(number)

    def rows(self, count: int) -> list[Row]:
        """Return up to `count` rows; the last one may be shorter."""
        plan, seq_len = self._reader.plan, self._seq_len
        if plan is not None:
            return [self._reader.planned(i) for i in range(min(count, len(plan.row_ends)))]
        tokens = self._reader.stream.num_tokens
        starts = range(0, min(tokens - 1, count * seq_len), seq_len)
        return [self._reader.window(at, min(seq_len + 1, tokens - at)) for at in starts]


def row_reader(
    name: str,
    stream: Stream,
    identity: Callable[[], str],
    data: DataConfig,
    seq_len: int,
    limit: int,
) -> RowReader:
    """Return what makes rows of a stream, after checking that the packing fits its documents.

    `identity` is asked for only where rows are planned: of foreign shards it reads every file.

    Raises:
        UserError: when conversations would be cut, or samples counted where there are none.
    """
    packing = data.packing
    if stream.is_supervised and (
        packing.kind == "concatenate" or packing.long_documents == "split"
    ):
        raise UserError(
            f"must not cut the conversations of {name}; use kind: best_fit or sequential, and "
            "long_documents: drop or truncate.",
            key="data.packing",
        )
    if data.objective == "samples" and not stream.is_supervised:
        raise UserError(
            f"counts conversations, and {name} has none; use objective: tokens, or prepare the "
            "source with --chat.",
            key="data.objective",
            value=data.objective,
        )
    plan = None
    if packing.kind != "concatenate":
        plan = plan_rows(stream, identity(), seq_len + 1, packing, Path(data.cache))
    answers = isinstance(data, PreferenceDataConfig)
    return RowReader(stream, seq_len, limit, plan, data.objective == "samples", answers)


def permute(index: int, size: int, key: int) -> int:
    """Return where the permutation named by `key` (64 bits) sends `index`.

    A Feistel network permutes the next even power of two; indices that land outside the range
    walk on until they land inside (Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """
    half = max(1, (size - 1).bit_length() + 1 >> 1)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for number in range(ROUNDS):
            mixed = xxhash.xxh64_intdigest(struct.pack("<BQ", number, right), key)
            left, right = right, left ^ (mixed & mask)
        index = left << half | right
        if index < size:
            return index
