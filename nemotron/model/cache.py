"""The states of several texts, which a model continues independently of each other."""

import heapq
from collections.abc import Sequence
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
)

BLOCK_SIZE = 64
"""Tokens whose keys and values are allotted together."""


class Cache:
    """The states of all layers, one row of text in each of `slots` slots.

    Mamba-2 layers keep a state of fixed size for each slot; attention layers share `blocks` blocks
    of `block_size` tokens, so that memory follows the texts' lengths. Without `blocks` the memory
    grows as needed. With `drafts`, the multi-token-prediction block has keys and values, too, and
    at most so many hidden states wait until it reads them. With `replay`, Mamba-2 layers keep their
    inputs since the last end of a chunk.
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
        """Return a slot for a new text: an empty one, or one that continues a snapshot."""
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
        """Return the state of a text now, which any number of texts can continue.

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
        last call, and its `CachedRows` kept the states.
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

    def count(
        self,
        slots: Sequence[int],
        num_tokens: int,
        states: list[list[tuple[Tensor, Tensor]]] | None = None,
    ) -> None:
        """Count the tokens that a call has appended to the texts of these slots.

        `states` are those after each token, for each Mamba-2 layer and of all rows, if the call
        kept them; `truncate` can go back to them until the next call.
        """
        for row, slot in enumerate(slots):
            if states:
                self._histories[slot] = _History(states, row, self.lengths[slot])
            else:
                self._histories.pop(slot, None)
            self.lengths[slot] += num_tokens

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
