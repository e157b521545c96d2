"""What a model remembers of several texts that are continued independently of each other."""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.model.blocks import Blocks
from nemotron.model.cache_formats import UNCHANGED, CacheFormats
from nemotron.model.config import ModelConfig
from nemotron.model.state import (
    CHUNK,
    Ahead,
    AttentionState,
    Keep,
    KeyValues,
    MambaSlots,
    MambaState,
    Partial,
    Places,
    slots_of,
)

BLOCK_SIZE = 64
"""Tokens whose keys and values are allotted together."""


class Cache:
    """The states of all layers, one row of text in each of `slots` slots.

    Mamba-2 layers keep a state of fixed size for each slot; attention layers share `blocks` blocks
    of `block_size` tokens, so that memory follows the texts' lengths. Without `blocks` the memory
    grows as needed. With `drafts`, there is also what the multi-token-prediction block remembers,
    which then reads up to so many hidden states at once that it has not read. With `replay`,
    Mamba-2 layers keep their inputs since the last end of a chunk.
    """

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        *,
        blocks: int | None = None,
        block_size: int = BLOCK_SIZE,
        drafts: int = 0,
        replay: bool = False,
        formats: CacheFormats = UNCHANGED,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        assert not replay or formats.state == "fp32", "a rounded state is not that of training"
        self.lengths, self.formats, self.replays = [0] * slots, formats, replay
        self.block_size, self.device = block_size, torch.device(device)
        self.blocks = Blocks(blocks)
        self.tables: list[list[int]] = [[] for _ in range(slots)]
        """The blocks of each slot, in the order of its text."""
        self._free = list(range(slots))
        self._histories: dict[int, _History] = {}
        self.layers: list[MambaSlots | KeyValues | None] = []
        for letter in config.hybrid_override_pattern:
            if letter == "M":
                self.layers.append(self._mamba(config, slots, dtype))
            else:
                self.layers.append(self._attention(config, dtype) if letter == "*" else None)
        self._mamba_slots = [la for la in self.layers if isinstance(la, MambaSlots)]
        self.ahead: Ahead | None = None
        if drafts:
            pools = [
                self._attention(config, dtype) if letter == "*" else None
                for letter in config.mtp_pattern
            ]
            unread = torch.zeros(slots, drafts, config.hidden_size, dtype=dtype, device=self.device)
            self.ahead = Ahead(pools, unread, [0] * slots)

    def _mamba(self, config: ModelConfig, slots: int, dtype: torch.dtype) -> MambaSlots:
        conv = (slots, config.conv_kernel - 1, config.conv_channels)
        ssm = (slots, config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
        wide, partial = self.formats.state_dtype(dtype), None
        if self.replays:
            partial = Partial(
                torch.zeros(slots, CHUNK, config.conv_channels, dtype=dtype, device=self.device),
                torch.zeros(slots, CHUNK, config.mamba_num_heads, dtype=wide, device=self.device),
            )
        return MambaSlots(
            torch.zeros(conv, dtype=dtype, device=self.device),
            torch.zeros(ssm, dtype=wide, device=self.device),
            # a seed for each layer
            len(self.layers) if self.formats.state == "fp16_sr" else None,
            partial,
        )

    def _attention(self, config: ModelConfig, dtype: torch.dtype) -> KeyValues:
        heads = (config.num_key_value_heads, config.head_dim)
        size = (self.blocks.count, self.block_size, *heads)
        dtype = self.formats.keys_values_dtype(dtype)
        return KeyValues(*(torch.zeros(size, dtype=dtype, device=self.device) for _ in range(2)))

    @property
    def slot_bytes(self) -> int:
        """Memory of the states of one text, whatever its length."""
        states = sum(t[0].nbytes for layer in self._mamba_slots for t in layer.tensors())
        return states + (0 if self.ahead is None else self.ahead.hidden[0].nbytes)

    @property
    def block_bytes(self) -> int:
        """Memory of one key-value block in all attention layers."""
        return sum(pool.keys[0].nbytes + pool.values[0].nbytes for pool in self.pools)

    @property
    def pools(self) -> list[KeyValues]:
        """Keys and values of all attention layers, those of the prediction block included."""
        layers = [*self.layers, *(self.ahead.layers if self.ahead is not None else [])]
        return [layer for layer in layers if isinstance(layer, KeyValues)]

    @property
    def num_free_slots(self) -> int:
        """Slots that hold no text."""
        return len(self._free)

    def admit(self, snapshot: "Snapshot | None" = None) -> int:
        """Return a slot for a new text: an empty one, or one that goes on from a snapshot."""
        assert self._free, f"all {len(self.lengths)} slots of the cache are in use"
        slot = heapq.heappop(self._free)
        if snapshot is None:
            self._reset(slot)
            return slot
        self.restore(slice(slot, slot + 1), snapshot.states)
        if self.ahead is not None and snapshot.hidden is not None:
            self.ahead.put(slot, snapshot.hidden)
        for block in snapshot.blocks:
            self.blocks.share(block)
        self.tables[slot] = list(snapshot.blocks)
        self.lengths[slot] = snapshot.length
        return slot

    def snapshot(self, slot: int) -> "Snapshot":
        """Return what is remembered of a text now, for any number of texts that go on from it.

        The states are copied, the blocks shared until `release`.
        """
        length = self.lengths[slot]
        blocks = self.tables[slot][: self.blocks_of(length)]
        for block in blocks:
            self.blocks.share(block)
        hidden = None if self.ahead is None else self.ahead.of(slot).clone()
        return Snapshot(length, self.copies(slice(slot, slot + 1)), blocks, hidden)

    def release(self, snapshot: "Snapshot") -> None:
        """Give the blocks of a snapshot back, which cannot be used any more."""
        for block in snapshot.blocks:
            self.blocks.release(block)
        snapshot.blocks.clear()

    def free(self, slot: int) -> None:
        """Forget the text of a slot and give its blocks back."""
        assert slot not in self._free, f"slot {slot} is free already"
        self._histories.pop(slot, None)
        self.cut(slot, 0)
        heapq.heappush(self._free, slot)

    def truncate(self, slot: int, length: int) -> None:
        """Forget all but the first `length` tokens of a slot.

        A Mamba-2 state cannot be run backwards: with such layers, `length` is 0 or lies within the
        last call, for which `rows` was asked to keep the states.
        """
        assert 0 <= length <= self.lengths[slot], f"slot {slot} has {self.lengths[slot]} tokens"
        if length == self.lengths[slot]:
            return
        if length == 0:
            self._reset(slot)
        elif self._mamba_slots:
            history = self._histories.get(slot)
            assert history is not None, f"the states of slot {slot} after every token were not kept"
            history.restore(self, slot, length)
        self.cut(slot, length)

    def rows(self, slots: Sequence[int], *, keep: Keep | None = None) -> "CachedRows":
        """Return the texts in `slots` as the rows of a call, which continues each of them.

        What is kept allows the rows to forget the last tokens of a call (`keep_first`). To keep
        `states`, the tokens pass the Mamba-2 layers one by one; with `inputs`, every call must be
        followed by `keep_first`.
        """
        return CachedRows(self, list(slots), keep)

    def states_of(
        self, rows: slice | Int[Tensor, " B"], *, keep: Keep | None = None
    ) -> "list[MambaState | AttentionState | None]":
        """Return what each layer remembers of the slots in `rows`, for a call."""
        states: list[MambaState | AttentionState | None] = []
        for layer in self.layers:
            if isinstance(layer, MambaSlots):
                states.append(MambaState(layer, rows, keep))
            else:
                states.append(None if layer is None else AttentionState(layer))
        return states

    def copies(self, rows: slice | Int[Tensor, " B"]) -> list[list[Tensor]]:
        """Return copies of the Mamba-2 states of the slots in `rows`, for `restore`."""
        return [[t[rows].clone() for t in layer.tensors()] for layer in self._mamba_slots]

    def restore(self, rows: slice | Int[Tensor, " B"], copies: list[list[Tensor]]) -> None:
        """Give the slots in `rows` these states again."""
        for layer, kept in zip(self._mamba_slots, copies, strict=True):
            for tensor, before in zip(layer.tensors(), kept, strict=True):
                tensor[rows] = before

    def count(self, slots: Sequence[int], num_tokens: int) -> None:
        """Count the tokens that a call has appended to the texts of these slots."""
        for slot in slots:
            self.lengths[slot] += num_tokens
            self._histories.pop(slot, None)

    def blocks_of(self, length: int) -> int:
        """Return how many blocks a text of `length` tokens fills or begins."""
        return -(-length // self.block_size)

    def missing_blocks(self, slot: int, length: int) -> int:
        """Return how many blocks `extend` would take."""
        more = self.blocks_of(length) - len(self.tables[slot])
        return max(0, more) + (self._shared_block(slot) is not None)

    def extend(self, slot: int, length: int) -> None:
        """Take the blocks that a text of `length` tokens needs; a shared last block is copied.

        Raises:
            OutOfBlocks: when there are not enough.
        """
        table = self.tables[slot]
        if (shared := self._shared_block(slot)) is not None:
            table[shared] = self._copy(table[shared])
        while len(table) * self.block_size < length:
            table.append(self._take(table[-1] if table else None))

    def _shared_block(self, slot: int) -> int | None:
        """Return the place of the block that is written next, if other texts read it."""
        place, table = self.lengths[slot] // self.block_size, self.tables[slot]
        return place if place < len(table) and self.blocks.is_shared(table[place]) else None

    def _take(self, after: int | None) -> int:
        block = self.blocks.take(after)
        for pool in self.pools:
            if pool.keys.shape[0] < self.blocks.count:
                pool.grow(self.blocks.count)
        return block

    def _copy(self, block: int) -> int:
        new = self._take(block)
        for pool in self.pools:
            pool.keys[new] = pool.keys[block]
            pool.values[new] = pool.values[block]
        self.blocks.release(block)
        return new

    def _reset(self, slot: int) -> None:
        self._histories.pop(slot, None)
        for layer in self._mamba_slots:
            for tensor in layer.tensors():
                tensor[slot].zero_()
        if self.ahead is not None:
            self.ahead.counts[slot] = 0

    def cut(self, slot: int, length: int) -> None:
        """Forget keys and values after the first `length` tokens; the states are the caller's."""
        table = self.tables[slot]
        while table and (len(table) - 1) * self.block_size >= length:
            self.blocks.release(table.pop())
        self.lengths[slot] = length


@dataclass
class Snapshot:
    """What a cache remembers of one text at one length."""

    length: int
    states: list[list[Tensor]]
    """For each Mamba-2 layer: convolution inputs, state, and what else belongs to a slot."""
    blocks: list[int]
    hidden: Float[Tensor, "T D"] | None = None
    """Those that the prediction block has not read, where it has a place in the cache."""


@dataclass
class _History:
    """The states after every token of a slot's newest call."""

    states: list[list[tuple[Tensor, Tensor]]]
    """For each Mamba-2 layer, for each token: convolution inputs and state, of all rows."""
    row: int
    first: int
    """Length of the text before the call."""

    def restore(self, cache: Cache, slot: int, length: int) -> None:
        for layer, states in zip(cache._mamba_slots, self.states, strict=True):
            assert 0 <= length - self.first < len(states), "the last call lies elsewhere"
            conv, ssm = states[length - self.first]
            layer.conv[slot] = conv[self.row]
            layer.ssm[slot] = ssm[self.row]


class CachedRows:
    """Texts of a cache as the rows of a call: what a model's `cache` argument takes.

    The same rows serve for any number of calls, each with equally many tokens for every row.
    """

    def __init__(self, cache: Cache, slots: list[int], keep: Keep | None = None) -> None:
        assert len(set(slots)) == len(slots) > 0, slots
        self.cache, self.slots = cache, slots
        self.layers = cache.states_of(slots_of(slots, cache.device), keep=keep)
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
        firsts = [self.cache.lengths[slot] for slot in self.slots]
        self.cache.count(self.slots, num_tokens)
        self._num_newest = num_tokens
        if states:
            for row, (slot, first) in enumerate(zip(self.slots, firsts, strict=True)):
                self.cache._histories[slot] = _History(states, row, first)

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
