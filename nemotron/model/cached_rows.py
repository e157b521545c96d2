"""Texts of a cache as the rows of a call, and where their keys and values go."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from nemotron.model.cache import Cache
from nemotron.model.state import AttentionState, Keep, KeyValues, MambaState, Places, slots_of


class CachedRows:
    """Texts of a cache as the rows of a call, which continues each of them.

    This is what the argument `cache` of a model takes. The same rows serve for any number of calls,
    each with equally many tokens for every row. What they keep allows them to forget the last
    tokens of a call (`keep_first`): to keep `states`, the tokens pass the Mamba-2 layers one by
    one; with `inputs`, every call must be followed by `keep_first`.
    """

    def __init__(self, cache: Cache, slots: Sequence[int], *, keep: Keep | None = None) -> None:
        assert len(set(slots)) == len(slots) > 0, slots
        self.cache, self.slots = cache, list(slots)
        self.layers = cache.states_of(slots_of(self.slots, cache.device), keep=keep)
        self._has_attention = any(isinstance(layer, KeyValues) for layer in cache.layers)
        self.advance: Callable[[Int[Tensor, " B"]], None] | None = None
        """Changes the states by the first tokens of the newest call, if the layers did not keep
        its inputs themselves."""

    def begin(self, num_tokens: int) -> None:
        """Prepare a call that appends `num_tokens` tokens to every row.

        Raises:
            OutOfBlocks: when their keys and values do not fit; no text has changed then.
        """
        places = self._places(num_tokens) if self._has_attention else None
        steps = None
        if self.cache.formats.state == "fp16_sr" or self.cache.replays:
            steps = self._tensor([self.cache.lengths[slot] for slot in self.slots])
        for layer in self.layers:
            if isinstance(layer, MambaState):
                layer.load()
                layer.steps = steps
            elif isinstance(layer, AttentionState):
                layer.places = places

    def end(self, num_tokens: int) -> None:
        """Count the tokens of the call."""
        states = [
            layer.history
            for layer in self.layers
            if isinstance(layer, MambaState) and layer.history is not None
        ]
        self.cache.count(self.slots, num_tokens, states)
        self._num_newest = num_tokens

    def keep_first(self, counts: Sequence[int]) -> None:
        """Keep the first `counts` tokens of each row of the newest call, and forget the others."""
        cache, num_tokens = self.cache, self._num_newest
        deferred = [
            layer for layer in self.layers if isinstance(layer, MambaState) and layer.keeps_inputs
        ]
        if self.advance is not None:
            self.advance(self._tensor(list(counts)))
            self.advance = None
        else:
            for layer in deferred:
                layer.advance(self._tensor(list(counts)))
        for slot, count in zip(self.slots, counts, strict=True):
            length = cache.lengths[slot] - num_tokens + count
            if deferred:
                cache.cut(slot, length)
            else:
                cache.truncate(slot, length)

    def _places(self, num_tokens: int) -> Places:
        lengths = [self.cache.lengths[slot] + num_tokens for slot in self.slots]
        return places_of(self.cache, self.slots, lengths, num_tokens)

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=self.cache.device)


def places_of(
    cache: Cache, slots: Sequence[int], lengths: Sequence[int], num_tokens: int, skipped: int = 0
) -> Places:
    """Return where `num_tokens` tokens go after which the slots have `lengths`; take blocks.

    The first `skipped` places of each row are not read.

    Raises:
        OutOfBlocks: when there are not enough; no text has changed then.
    """
    size = cache.block_size
    for slot, length in zip(slots, lengths, strict=True):
        cache.extend(slot, length)
    tables, longest = [cache.tables[slot] for slot in slots], max(lengths)
    if len(tables) == 1 and _follow(tables[0]):
        begin = tables[0][0] * size
        end = begin + longest
        places = slice(end - num_tokens, end), slice(begin + skipped, end)
        return Places(*places, longest - skipped, None, skipped)
    written = [
        table[position // size] * size + position % size
        for table, length in zip(tables, lengths, strict=True)
        for position in range(length - num_tokens, length)
    ]
    count = -(-longest // size)
    # shorter rows are filled up with any block, which is never read
    read = [block for table in tables for block in (table + [0] * count)[:count]]
    ends = [length - skipped for length in lengths]
    return Places(
        torch.tensor(written, device=cache.device),
        torch.tensor(read, device=cache.device),
        longest - skipped,
        None if min(lengths) == longest else torch.tensor(ends, device=cache.device),
        skipped,
    )


def _follow(blocks: list[int]) -> bool:
    return blocks == list(range(blocks[0], blocks[0] + len(blocks)))
