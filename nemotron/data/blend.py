"""Which source each row comes from: exact shares, computed for any row without a table."""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple


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
