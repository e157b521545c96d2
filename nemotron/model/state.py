"""What one layer remembers: of every slot of a cache, and of the rows of one call."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.model.cache_formats import load_values, round_by_chance, store_values
from nemotron.model.few_tokens import Inputs

Keep = Literal["states", "inputs"]
"""What of a call is kept so that its last tokens can be forgotten.

`states`: the states after every token. `inputs`: only what changes the state, which stays as it is
until it is known how many tokens are kept.
"""


CHUNK = 64
"""Tokens of a text that are scanned together where the scan is replayed."""


@dataclass
class Partial:
    """Inputs of the scan since the last end of a chunk; more of them may be there, of no meaning.

    With them every token is scanned as in a pass over the whole text, from the state at that end.
    """

    mixed: Float[Tensor, "slots Q C"]
    """After the convolution."""
    dt: Float[Tensor, "slots Q H"]


@dataclass
class MambaSlots:
    """The states of one Mamba-2 layer, one for each slot.

    `conv` holds the last W-1 inputs of the convolution, before the activation; `ssm` is float32
    even in a bf16 model, as serving engines keep it, unless asked for otherwise.
    """

    conv: Float[Tensor, "slots W C"]
    ssm: Float[Tensor, "slots H P N"]
    seed: int | None = None
    """Of stochastic rounding to the dtype of `ssm`; absent: to nearest."""
    partial: Partial | None = None
    """If the scan is replayed; `ssm` is then the state at the last end of a chunk."""

    def tensors(self) -> list[Tensor]:
        """Return all that belongs to a slot."""
        more = [] if self.partial is None else [self.partial.mixed, self.partial.dt]
        return [self.conv, self.ssm, *more]

    @property
    def is_rounded(self) -> bool:
        """Whether states are computed in more bits than they are stored in."""
        return self.ssm.dtype == torch.float16


class MambaState:
    """The state of one Mamba-2 layer for the rows of a call.

    Rows in neighboring slots are views: what changes `conv` and `ssm` in place changes the slots.
    The others are copies, read when they are first asked for after `load`; `store` brings both
    kinds up to date. `in_place` is for those that need neither.
    """

    history: list[tuple[Tensor, Tensor]] | None
    """If `states` are kept: the state before the call, then after each token."""
    inputs: Inputs | None
    """If `inputs` are kept: those of the newest call."""

    def __init__(
        self, slots: MambaSlots, rows: slice | Int[Tensor, " B"], keep: Keep | None = None
    ) -> None:
        self._slots, self._rows = slots, rows
        self.history = [] if keep == "states" else None
        self.keeps_inputs, self.inputs = keep == "inputs", None
        self.steps: Int[Tensor, " B"] | None = None
        """Lengths of the texts before the call, for stochastic rounding and replay."""
        self.partial: Partial | None = None
        self._here: tuple[Tensor, Tensor] | None = None

    @property
    def conv(self) -> Float[Tensor, "B W C"]:
        """The last W-1 inputs of the convolution."""
        return self._both[0]

    @property
    def ssm(self) -> Float[Tensor, "B H P N"]:
        """The states, float32 where they are stored in fewer bits."""
        return self._both[1]

    @property
    def _both(self) -> tuple[Tensor, Tensor]:
        if self._here is None:
            rows, slots = self._rows, self._slots
            if isinstance(rows, slice):
                conv, ssm = slots.conv[rows], slots.ssm[rows]
            else:
                conv, ssm = (t.index_select(0, rows) for t in (slots.conv, slots.ssm))
            self._here = conv, ssm.float() if slots.is_rounded else ssm
        return self._here

    def in_place(self) -> tuple[Tensor, Tensor, Int[Tensor, " B"] | None] | None:
        """Return `conv` and `ssm` as they are stored, and the rows' slots in them.

        Without slots, the rows are all there is. None where a call must do more than change them.
        """
        slots, rows = self._slots, self._rows
        if self.history is not None or self.keeps_inputs or slots.partial is not None:
            return None
        if slots.seed is not None:
            return None
        if isinstance(rows, slice):
            return slots.conv[rows], slots.ssm[rows], None
        return slots.conv, slots.ssm, rows

    def load(self) -> None:
        """Forget what was read of the slots: a call begins."""
        self._here = None
        if (partial := self._slots.partial) is not None:
            self.partial = Partial(partial.mixed[self._rows], partial.dt[self._rows])
        if self.history is not None:
            self.history = [(self.conv.clone(), self.ssm.clone())]

    def advance(self, counts: Int[Tensor, " B"]) -> None:
        """Change the state by the first `counts` tokens of each row of the newest call."""
        inputs, self.inputs = self.inputs, None
        assert inputs is not None, "the inputs of a call are used once"
        inputs.advance(self.ssm, counts)
        self.store(inputs.conv(counts), self.ssm)

    def store(self, conv: Float[Tensor, "B W C"], ssm: Float[Tensor, "B H P N"]) -> None:
        """Replace the state by that after the newest token; `ssm` may be changed in place."""
        if self._slots.is_rounded:
            rounded = self._round(ssm)
            self._slots.conv[self._rows], self._slots.ssm[self._rows] = conv, rounded
            self._here = conv, rounded.float()
        elif isinstance(self._rows, slice):
            self.conv.copy_(conv)
            if ssm is not self.ssm:
                self.ssm.copy_(ssm)
        else:
            self._here = conv, ssm
            self._slots.conv.index_copy_(0, self._rows, conv)
            self._slots.ssm.index_copy_(0, self._rows, ssm)
            if self._slots.partial is not None and self.partial is not None:
                self._slots.partial.mixed[self._rows] = self.partial.mixed
                self._slots.partial.dt[self._rows] = self.partial.dt
        if self.history is not None:
            self.history.append((self.conv.clone(), self.ssm.clone()))

    def _round(self, ssm: Float[Tensor, "B H P N"]) -> Float[Tensor, "B H P N"]:
        if self._slots.seed is None:
            return ssm.to(torch.float16)
        assert self.steps is not None, "the rows must be begun first"
        rounded = round_by_chance(ssm, self._slots.seed, self.steps)
        self.steps = self.steps + 1
        return rounded


@dataclass
class KeyValues:
    """Keys and values of one attention layer, in blocks that any rows may own."""

    keys: Float[Tensor, "blocks size Hkv Dh"]
    values: Float[Tensor, "blocks size Hkv Dh"]

    def grow(self, count: int) -> None:
        """Make room for `count` blocks, the present ones first."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(count, *old.shape[1:])
            new[: old.shape[0]] = old
            setattr(self, name, new)


@dataclass
class Places:
    """Where the tokens of a call go, and where all tokens of its rows lie: for every layer."""

    written: slice | Int[Tensor, " M"]
    """Positions of the new tokens, row after row, counted through all blocks."""
    read: slice | Int[Tensor, " blocks"]
    """Blocks of all rows, equally many for each; positions for a row whose blocks follow."""
    longest: int
    lengths: Int[Tensor, " B"] | None
    """Tokens of each row, the new ones included; absent: all have `longest`."""
    skipped: int = 0
    """Places at the beginning of each row that hold nothing; not counted in `longest`, `lengths`,
    nor in a `read` of positions."""


@dataclass
class AttentionState:
    """Keys and values of one attention layer for the rows of a call."""

    pool: KeyValues
    places: Places | None = field(default=None, repr=False)
    """Set before each call."""

    def append(
        self, k: Float[Tensor, "B T Hkv Dh"], v: Float[Tensor, "B T Hkv Dh"]
    ) -> tuple[Float[Tensor, "B S Hkv Dh"], Float[Tensor, "B S Hkv Dh"], Int[Tensor, " B"] | None]:
        """Add the newest keys and values; return all of them and how many each row has."""
        places = self.places
        assert places is not None, "the rows must be begun first"
        results = []
        for pool, new in ((self.pool.keys, k), (self.pool.values, v)):
            flat = pool.flatten(0, 1)
            stored = store_values(new, flat.dtype)
            if isinstance(places.written, slice):
                flat[places.written] = stored[0]
            else:
                flat.index_copy_(0, places.written, stored.flatten(0, 1))
            if isinstance(places.read, slice):
                results.append(load_values(flat[places.read].unsqueeze(0), new.dtype))
            else:
                blocks = pool.index_select(0, places.read)
                rows = blocks.view(k.shape[0], -1, *k.shape[2:])
                first = places.skipped
                rows = rows[:, first : first + places.longest]
                results.append(load_values(rows, new.dtype))
        return results[0], results[1], places.lengths


@dataclass
class Ahead:
    """What the multi-token-prediction block remembers of every slot.

    It reads the hidden state of a token with the token after it; what it remembers of both lies
    where the second one's keys and values lie in the backbone, so place 0 holds nothing.
    """

    layers: list[KeyValues | None]
    hidden: Float[Tensor, "slots W D"]
    """The backbone's newest hidden states, which the block has not read, or read its own
    predictions of."""
    counts: list[int]
    """How many of them a slot has."""

    def put(self, slot: int, hidden: Float[Tensor, "T D"]) -> None:
        """Replace the hidden states of a slot."""
        count = hidden.shape[0]
        self.hidden[slot, :count] = hidden
        self.counts[slot] = count

    def add(self, slots: list[int], hidden: Float[Tensor, "B D"]) -> None:
        """Append one to each slot, of a token that was read without a draft.

        Where there is no room for it all are lost: the block cannot go on from a text without them.
        """
        most = self.hidden.shape[1]
        rows = [row for row, slot in enumerate(slots) if 0 < self.counts[slot] < most]
        places = [slots[row] for row in rows], [self.counts[slots[row]] for row in rows]
        if rows:
            self.hidden[places] = hidden if len(rows) == len(slots) else hidden[rows]
        for slot in slots:
            self.counts[slot] = (self.counts[slot] + 1) % (most + 1) if self.counts[slot] else 0

    def of(self, slot: int) -> Float[Tensor, "T D"]:
        """Return the hidden states of a slot."""
        return self.hidden[slot, : self.counts[slot]]


def slots_of(slots: list[int], device: torch.device) -> slice | Int[Tensor, " B"]:
    """Return neighboring slots as a slice, so that they can be viewed, and others as numbers."""
    if slots == list(range(slots[0], slots[0] + len(slots))):
        return slice(slots[0], slots[0] + len(slots))
    return torch.tensor(slots, device=device)
