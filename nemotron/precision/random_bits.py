"""Random bits for stochastic rounding: a function of a key and an element's place, no state.

Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3" (Philox4x32-10).
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF
BYTES_PER_CALL = 16


def philox(counter: Int[Tensor, "calls 4"], key: tuple[int, int]) -> Int[Tensor, "calls 4"]:
    """Return four random words of 32 bits, held in int64, for each counter of four such words."""
    words = list(counter.unbind(-1))
    k0, k1 = key
    for _ in range(ROUNDS):
        # each product of two 32-bit words needs 64 bits, of which int64 keeps the right ones
        high0, low0 = _multiply(words[0], MULTIPLIERS[0])
        high1, low1 = _multiply(words[2], MULTIPLIERS[1])
        words = [high1 ^ words[1] ^ k0, low1, high0 ^ words[3] ^ k1, low0]
        k0, k1 = k0 + WEYL[0] & LOW, k1 + WEYL[1] & LOW
    return torch.stack(words, -1)


Numbers = int | Int[Tensor, "*n"]
"""Numbers of rows or columns in the whole: the first of a range, or each one's."""


@dataclass(frozen=True)
class Draw:
    """What the random bits of a gradient hang on; nothing is drawn without it."""

    key: tuple[int, int]
    """Two 32-bit words that name seed, step, layer and call."""
    rows: Numbers = 0
    """Number of each row in the whole batch of the step."""
    columns: Numbers = 0
    """Number of each column in the whole matrix, of which a rank may hold some."""

    def part(self, rows: slice) -> "Draw":
        """Return what belongs to some of the rows."""
        own = self.rows + rows.start if isinstance(self.rows, int) else self.rows[rows]
        return replace(self, rows=own)

    def bits(
        self, rows: int, columns: int, *, stream: int, device: torch.device
    ) -> UInt8[Tensor, "rows columns"]:
        """Return 8 random bits for each element; another stream gives others.

        Rows beyond those that have a number, which only fill up a chunk, are numbered on.
        """
        numbers = _numbered(self.rows, rows, device)
        if isinstance(self.columns, int):
            aligned = self.columns // BYTES_PER_CALL * BYTES_PER_CALL
            first = self.columns - aligned
            calls = torch.arange(-(-(first + columns) // BYTES_PER_CALL), device=device)
            calls = calls + aligned // BYTES_PER_CALL
            drawn = _random_bytes(numbers, calls, self.key, stream)
            return drawn[:, first : first + columns]
        own = self.columns.to(device)
        calls, place = (own // BYTES_PER_CALL).unique(return_inverse=True)
        drawn = _random_bytes(numbers, calls, self.key, stream)
        return drawn[:, place * BYTES_PER_CALL + own % BYTES_PER_CALL]


def _numbered(rows: Numbers, count: int, device: torch.device) -> Int[Tensor, " count"]:
    if isinstance(rows, int):
        return torch.arange(rows, rows + count, device=device)
    own = rows.to(device)
    missing = count - own.shape[0]
    assert missing >= 0, f"{own.shape[0]} numbers for {count} rows"
    if not missing:
        return own
    return torch.cat([own, own[-1] + torch.arange(1, missing + 1, device=device)])


def _random_bytes(
    rows: Int[Tensor, " M"], calls: Int[Tensor, " C"], key: tuple[int, int], stream: int
) -> UInt8[Tensor, "M bytes"]:
    """Return the 16 bytes of each call in each row."""
    row, call = rows.repeat_interleave(len(calls)), calls.repeat(len(rows))
    counter = torch.stack([call, row & LOW, row >> 32, torch.full_like(row, stream)], -1)
    words = philox(counter, key)
    # of each word the four low bytes, the lowest first
    low = words.view(torch.uint8).view(-1, BYTES_PER_CALL // 4, 8)[:, :, :4]
    return low.reshape(len(rows), len(calls) * BYTES_PER_CALL)


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of the product of two 32-bit words."""
    product = word * factor
    return (product >> 32) & LOW, product & LOW
