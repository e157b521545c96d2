"""Which source each row comes from, and which of its samples: computed for any row, no table."""

import heapq
import math
import struct
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import xxhash

ROUNDS = 6
"""Of the network that shuffles; two rounds are far from uniform, a test says."""


class _Node(NamedTuple):
    """A group of sources: a single one, or two groups that share its rows."""

    weight: int
    source: int
    pair: "tuple[_Node, _Node] | None"


class Blend:
    """Shares rows out to sources in proportion to their weights.

    Sources are paired up as in Huffman's code, lightest first. In each pair the first of `n` rows
    go to the left group `round(n * left / (left + right))` times, exactly, in whole numbers. So the
    rows of a source stay within one of their exact share for up to three sources (1/2 from its own
    pair and less than 1/2 from the pair above), and within two for any number.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """Take positive weights; a weight means the decimal number as it is written."""
        exact = [Fraction(repr(float(weight))) for weight in weights]
        scale = math.lcm(*(weight.denominator for weight in exact))
        heap = [(int(w * scale), i, _Node(int(w * scale), i, None)) for i, w in enumerate(exact)]
        heapq.heapify(heap)
        for number in range(len(heap), 2 * len(heap) - 1):
            right, left = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
            weight = left.weight + right.weight
            heapq.heappush(heap, (weight, number, _Node(weight, -1, (left, right))))
        self._root = heap[0][2]

    def locate(self, row: int) -> tuple[int, int]:
        """Return the source of a row, and how many rows before it come from the same source."""
        node = self._root
        while node.pair is not None:
            left, right = node.pair
            before, after = _share(row, left, node), _share(row + 1, left, node)
            node, row = (left, before) if after > before else (right, row - before)
        return node.source, row

    def counts(self, rows: int) -> dict[int, int]:
        """Return how many of the first `rows` rows come from each source."""
        found = {}
        open_nodes = [(self._root, rows)]
        while open_nodes:
            node, share = open_nodes.pop()
            if node.pair is None:
                found[node.source] = share
                continue
            left, right = node.pair
            taken = _share(share, left, node)
            open_nodes += [(left, taken), (right, share - taken)]
        return found


def _share(rows: int, part: _Node, whole: _Node) -> int:
    """Return `rows * part / whole`, rounded to the nearest whole number, halves up."""
    return (2 * rows * part.weight + whole.weight) // (2 * whole.weight)


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
