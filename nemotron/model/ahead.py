"""Rows of a call of the multi-token-prediction block, which has its own part of a cache."""

from collections.abc import Sequence

from nemotron.model.cache import Cache
from nemotron.model.cached_rows import places_of
from nemotron.model.state import AttentionState, MambaState

SKIPPED = 1
"""Places at the beginning of each text that hold nothing: no token is before the first one."""


class RowsAhead:
    """Texts of a cache as the rows of a call of the multi-token-prediction block.

    `firsts` are the places in the text of the first token of each row; what the block remembers
    from there on is replaced.
    """

    def __init__(self, cache: Cache, slots: Sequence[int], firsts: Sequence[int]) -> None:
        assert cache.ahead is not None, "the cache has no place for drafts"
        assert min(firsts) >= SKIPPED, "nothing is before the first token"
        self.cache, self.slots, self.firsts = cache, list(slots), list(firsts)
        self.layers: list[MambaState | AttentionState | None] = [
            None if pool is None else AttentionState(pool) for pool in cache.ahead.layers
        ]

    def begin(self, num_tokens: int) -> None:
        """As `CachedRows.begin`."""
        lengths = [first + num_tokens for first in self.firsts]
        places = places_of(self.cache, self.slots, lengths, num_tokens, skipped=SKIPPED)
        for layer in self.layers:
            if isinstance(layer, AttentionState):
                layer.places = places

    def end(self, num_tokens: int) -> None:
        """Let the next call follow this one."""
        self.firsts = [first + num_tokens for first in self.firsts]
