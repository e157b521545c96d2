"""Three ways to forget the last tokens of a pass, which Mamba-2 states cannot undo."""

from collections.abc import Sequence
from typing import Literal, Protocol

from jaxtyping import Int
from torch import Tensor

from nemotron.model.cache import Cache
from nemotron.model.cached_rows import CachedRows
from nemotron.model.hybrid import HybridLM
from nemotron.model.state import slots_of

Way = Literal["replay", "store", "snapshot"]
"""`replay`: the pass leaves the states as they are and keeps its inputs; the tokens that are kept
change the states then. `store`: the states after every token are kept. `snapshot`: the states from
before are copied, and the model reads the tokens that are kept again; slow, for comparison."""


class Rollback(Protocol):
    """One pass: `rows`, then the model, then `keep_first`."""

    def rows(self, cache: Cache, slots: Sequence[int]) -> CachedRows:
        """Return the rows that the model reads tokens into."""

    def keep_first(
        self, model: HybridLM, rows: CachedRows, tokens: Int[Tensor, "B T"], counts: Sequence[int]
    ) -> None:
        """Keep the first `counts` of the `tokens` that were read, and forget the others."""


class Replay:
    """`replay`: keeps only the inputs, and adds a few operations in each Mamba-2 layer."""

    def __init__(self) -> None:
        self._rows: CachedRows | None = None

    def rows(self, cache: Cache, slots: Sequence[int]) -> CachedRows:
        """As `Rollback.rows`."""
        if self._rows is None or self._rows.slots != slots:
            self._rows = CachedRows(cache, slots, keep="inputs")
        return self._rows

    def keep_first(
        self, model: HybridLM, rows: CachedRows, tokens: Int[Tensor, "B T"], counts: Sequence[int]
    ) -> None:
        """As `Rollback.keep_first`."""
        rows.keep_first(counts)


class Store:
    """`store`: memory of a state for each token, and the tokens one by one in Mamba-2 layers."""

    def rows(self, cache: Cache, slots: Sequence[int]) -> CachedRows:
        """As `Rollback.rows`."""
        return CachedRows(cache, slots, keep="states")

    def keep_first(
        self, model: HybridLM, rows: CachedRows, tokens: Int[Tensor, "B T"], counts: Sequence[int]
    ) -> None:
        """As `Rollback.keep_first`."""
        rows.keep_first(counts)


class Copy:
    """`snapshot`: keeps one more state, and passes a row again if it forgets a token."""

    def __init__(self) -> None:
        self._copies: list[list[Tensor]] = []

    def rows(self, cache: Cache, slots: Sequence[int]) -> CachedRows:
        """As `Rollback.rows`."""
        self._copies = cache.copies(slots_of(list(slots), cache.device))
        return CachedRows(cache, slots)

    def keep_first(
        self, model: HybridLM, rows: CachedRows, tokens: Int[Tensor, "B T"], counts: Sequence[int]
    ) -> None:
        """As `Rollback.keep_first`."""
        cache, num_tokens = rows.cache, tokens.shape[1]
        for row, (slot, count) in enumerate(zip(rows.slots, counts, strict=True)):
            if count == num_tokens:
                continue
            before = [[kept[row : row + 1] for kept in layer] for layer in self._copies]
            cache.restore(slice(slot, slot + 1), before)
            cache.cut(slot, cache.lengths[slot] - num_tokens)
            model(tokens[row : row + 1, :count], cache=CachedRows(cache, [slot]))


WAYS: dict[Way, type[Rollback]] = {"replay": Replay, "store": Store, "snapshot": Copy}
