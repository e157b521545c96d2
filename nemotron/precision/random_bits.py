"""Random bits for stochastic rounding: a function of a key and an element's place, no state.

Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3" (Philox4x32-10).
"""

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


def random_bytes(
    rows: int,
    columns: int,
    *,
    key: tuple[int, int],
    first_row: int = 0,
    stream: int = 0,
    device: torch.device | str = "cpu",
) -> UInt8[Tensor, "rows columns"]:
    """Return 8 random bits for each element of a matrix.

    They hang on `key`, `stream` and the element's row and column alone, where `first_row` is
    the number of the first row: a part of a matrix gets the bits that it has in the whole.
    """
    calls = -(-columns // BYTES_PER_CALL)
    row = torch.arange(first_row, first_row + rows, device=device).repeat_interleave(calls)
    call = torch.arange(calls, device=device).repeat(rows)
    counter = torch.stack([call, row & LOW, row >> 32, torch.full_like(row, stream)], -1)
    words = philox(counter, key)
    # of each word the four low bytes, the lowest first
    low = words.view(torch.uint8).view(-1, BYTES_PER_CALL // 4, 8)[:, :, :4]
    return low.reshape(rows, calls * BYTES_PER_CALL)[:, :columns]


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of the product of two 32-bit words."""
    product = word * factor
    return (product >> 32) & LOW, product & LOW
