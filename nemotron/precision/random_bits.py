"""Random bits for stochastic rounding: a function of a key and an element's place, no state.

Source: Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators" (SplitMix64).
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from nemotron.precision.groups import Groups

GAMMA = 0x9E3779B97F4A7C15
"""What the state grows by from one word to the next."""
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
"""Shifts and factors that make a word out of a state; a last shift of 31 follows."""
BYTES = 8
"""Of a word."""


def mix(state: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Make a random word of 64 bits out of each state, in place."""
    for shift, factor in MIX:
        state.bitwise_xor_(_shifted(state, shift)).mul_(_signed(factor))
    return state.bitwise_xor_(_shifted(state, 31))


def words(start: Int[Tensor, "*shape"], numbers: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Return the words of those numbers, counted from 0, of the sequences with those seeds."""
    return mix((numbers + 1) * _signed(GAMMA) + start)


Numbers = int | Int[Tensor, "*n"]
"""Numbers of rows or columns in the whole: the first of a range, or each one's."""


@dataclass(frozen=True)
class Draw:
    """What the random bits of a gradient depend on; nothing is drawn without it."""

    key: int
    """A word of 64 bits that names seed, step, layer and call."""
    rows: Numbers = 0
    """Number of each row in the whole batch of the step."""
    columns: Numbers = 0
    """Number of each column in the whole matrix, of which a rank may hold some."""

    def for_rows(self, rows: slice) -> "Draw":
        """Return what the bits of some of the rows depend on."""
        own = self.rows + rows.start if isinstance(self.rows, int) else self.rows[rows]
        return replace(self, rows=own)

    def pad(self, groups: Groups) -> "Draw":
        """Number the rows of a matrix that is padded: its padding is numbered on.

        They need bits as well: the Hadamard transform mixes a chunk's tokens into all its rows.
        """
        if groups.padded == groups.sizes:
            return self
        own = self.rows
        if isinstance(own, int):
            own = torch.arange(own, own + sum(groups.sizes))
        sizes, padded = torch.tensor(groups.sizes), torch.tensor(groups.padded)
        group = torch.arange(len(sizes)).repeat_interleave(padded)
        place = torch.arange(len(group)) - torch.tensor(groups.starts)[group]
        last = sizes[group] - 1
        source = (sizes.cumsum(0) - sizes)[group] + place.minimum(last)
        further = (place - last).clamp(min=0)
        return replace(self, rows=own[source.to(own.device)] + further.to(own.device))

    def seeds(self, rows: int, *, stream: int, device: torch.device) -> Int[Tensor, " rows"]:
        """Return the seed of each row's sequence; another stream gives others."""
        # it is a word of the stream's sequence, whose own seed is one of the key's
        key = words(torch.tensor(_signed(self.key)), torch.tensor(stream)).item()
        return mix((_numbered(self.rows, rows, device) + 1) * _signed(GAMMA) + int(key))

    def bits(
        self, rows: int, columns: int, *, stream: int, device: torch.device
    ) -> UInt8[Tensor, "rows columns"]:
        """Return 8 random bits for each element; another stream gives others."""
        seeds = self.seeds(rows, stream=stream, device=device).unsqueeze(1)
        if isinstance(self.columns, int):
            first = self.columns % BYTES
            calls = torch.arange(-(-(first + columns) // BYTES), device=device)
            drawn = words(seeds, calls + self.columns // BYTES).view(torch.uint8)
            return drawn[:, first : first + columns]
        own = self.columns.to(device)
        calls, place = (own // BYTES).unique(return_inverse=True)
        drawn = words(seeds, calls).view(torch.uint8)
        return drawn[:, place * BYTES + own % BYTES]


def _numbered(rows: Numbers, count: int, device: torch.device) -> Int[Tensor, " count"]:
    if isinstance(rows, int):
        return torch.arange(rows, rows + count, device=device)
    assert rows.shape == (count,), f"{tuple(rows.shape)} numbers for {count} rows"
    return rows.to(device)


def _shifted(state: Tensor, by: int) -> Tensor:
    """Shift words to the right as if they had no sign."""
    return (state >> by).bitwise_and_((1 << 64 - by) - 1)


def _signed(word: int) -> int:
    """Return the int64 with the bits of a word."""
    return word - (1 << 64) if word >> 63 else word
