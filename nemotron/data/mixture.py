"""Which row of which source stands at each place of a run: computed for any step, no table."""

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from nemotron.data.source import Source
from nemotron.data.timeline import Phase, Timeline

Key = tuple[str, int]
"""Name of a source and length of its rows."""


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


@dataclass(frozen=True)
class Mixture:
    """The rows of one length in one phase."""

    seq_len: int
    rows_per_step: int
    blend: Blend
    sources: tuple[Source, ...]
    first_rows: tuple[int, ...]
    """Rows that each source gave to earlier phases in this length."""

    def rows(self, before: int, rows: slice) -> Iterator[tuple[Source, tuple[int, int]]]:
        """Yield source, pass and sample of the rows after `before` steps of this mixture."""
        first = before * self.rows_per_step
        for row in range(first, first + self.rows_per_step)[rows]:
            number, index = self.blend.locate(row)
            source = self.sources[number]
            yield source, source.place(self.first_rows[number] + index)


class Mixtures:
    """The mixtures of all phases, and how they alternate where a phase has several lengths."""

    def __init__(self, timeline: Timeline, open_source: Callable[[str, int], Source]) -> None:
        """Take what opens a source by its name and length of row, once for each phase."""
        self.timeline = timeline
        self.sources: dict[Key, Source] = {}
        self._phases: list[list[Mixture]] = []
        self._alternations: list[Blend] = []
        given: dict[Key, int] = {}
        for number, phase in enumerate(timeline.phases):
            for length in phase.lengths:
                for leaf in length.leaves:
                    key = leaf.source.name, length.seq_len
                    if key not in self.sources:
                        self.sources[key] = open_source(*key)
            self._phases.append(
                [self._mix(phase, index, given) for index in range(len(phase.lengths))]
            )
            self._alternations.append(Blend([length.share for length in phase.lengths]))
            for key, rows in self._count(number, phase.num_steps).items():
                given[key] = given.get(key, 0) + rows

    def locate(self, step: int) -> tuple[Mixture, int]:
        """Return the mixture of a step, and how many earlier steps of its phase are of it."""
        phase = self.timeline.phase_of(step)
        inside = step - self.timeline.first_steps[phase]
        index, before = self._alternations[phase].locate(inside)
        return self._phases[phase][index], before

    def rows_read(self, step: int) -> dict[Key, int]:
        """Return the rows of each source and length in all steps before this one."""
        last = self.timeline.phase_of(step)
        total = dict.fromkeys(self.sources, 0)
        for number in range(last + 1):
            end = step if number == last else self.timeline.first_steps[number + 1]
            for key, rows in self._count(number, end - self.timeline.first_steps[number]).items():
                total[key] += rows
        return total

    def _mix(self, phase: Phase, index: int, given: dict[Key, int]) -> Mixture:
        length = phase.lengths[index]
        keys = [(leaf.source.name, length.seq_len) for leaf in length.leaves]
        return Mixture(
            length.seq_len,
            phase.tokens_per_step // length.seq_len,
            Blend([leaf.weight for leaf in length.leaves]),
            tuple(self.sources[key] for key in keys),
            tuple(given.get(key, 0) for key in keys),
        )

    def _count(self, phase: int, steps: int) -> dict[Key, int]:
        """Return the rows of each source and length in the first steps of a phase."""
        total: dict[Key, int] = {}
        shares = self._alternations[phase].counts(steps)
        for index, mixture in enumerate(self._phases[phase]):
            counts = mixture.blend.counts(shares[index] * mixture.rows_per_step)
            for number, source in enumerate(mixture.sources):
                total[source.name, source.seq_len] = counts[number]
        return total


def _share(rows: int, part: _Node, whole: _Node) -> int:
    """Return `rows * part / whole`, rounded to the nearest whole number, halves up."""
    return (2 * rows * part.weight + whole.weight) // (2 * whole.weight)
