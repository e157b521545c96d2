"""A keyed shuffle of `range(size)` that is computed one index at a time and stores nothing."""

import struct

import xxhash

ROUNDS = 6


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
