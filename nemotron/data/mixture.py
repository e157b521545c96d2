"""What a run reads: its phases, and which row of which source stands at each place, by formula."""

import bisect
import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

from nemotron.data.config import Leaf, ValidationConfig

if TYPE_CHECKING:  # numpy comes with it, which a recipe need not wait for
    from nemotron.data.source import Source

Key = tuple[str, int]
"""Name of a source and length of its rows."""


@dataclass(frozen=True)
class RowLength:
    """Rows of one length in a phase, and what they are made of."""

    seq_len: int
    share: float
    """Share of the phase's steps, relative to the other lengths."""
    leaves: tuple[Leaf, ...]
    validation: tuple[ValidationConfig, ...] = ()
    """Sets of documents that its blend names to be evaluated."""


@dataclass(frozen=True)
class Phase:
    """A stretch of steps of one size, over one blend for each length of row."""

    name: str
    num_steps: int
    tokens_per_step: int
    lengths: tuple[RowLength, ...]


class Timeline:
    """The phases of a run, end to end; a change comes exactly between two steps."""

    def __init__(self, phases: Sequence[Phase]) -> None:
        self.phases = tuple(phases)
        self.first_steps = [0]
        self.first_tokens = [0]
        for phase in phases:
            self.first_steps.append(self.first_steps[-1] + phase.num_steps)
            self.first_tokens.append(
                self.first_tokens[-1] + phase.num_steps * phase.tokens_per_step
            )

    @property
    def leaves(self) -> list[Leaf]:
        """Every source of every phase, as often as it is named."""
        lengths = [length for phase in self.phases for length in phase.lengths]
        return [leaf for length in lengths for leaf in length.leaves]

    @property
    def validation(self) -> list[ValidationConfig]:
        """Every set to be evaluated of every phase, as often as it is named."""
        return [own for part in self.phases for rows in part.lengths for own in rows.validation]

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return self.first_steps[-1]

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.first_tokens[-1]

    def phase_of(self, step: int) -> int:
        """Return the number of the phase to which a step belongs; the last has no end."""
        last = len(self.phases) - 1
        return min(last, bisect.bisect_right(self.first_steps, step) - 1)

    def tokens_per_step(self, step: int) -> int:
        """Return the tokens of a step."""
        return self.phases[self.phase_of(step)].tokens_per_step

    def tokens_before(self, step: int) -> int:
        """Return the tokens of all steps before this one."""
        number = self.phase_of(step)
        inside = (step - self.first_steps[number]) * self.phases[number].tokens_per_step
        return self.first_tokens[number] + inside

    def describe(self) -> Iterator[str]:
        """Yield a line for each phase, and for each pass that rows of another length begin."""
        seen: dict[str, set[int]] = {}
        for number, phase in enumerate(self.phases):
            lengths = " and ".join(f"{length.seq_len:,}" for length in phase.lengths)
            yield (
                f"phase {phase.name}: from token {self.first_tokens[number]:,}, "
                f"{phase.num_steps:,} steps of {phase.tokens_per_step:,} tokens in rows of "
                f"{lengths}"
            )
            for length in phase.lengths:
                for leaf in length.leaves:
                    known = seen.setdefault(leaf.source.name, set())
                    if known - {length.seq_len}:
                        yield (
                            f"phase {phase.name}: {leaf.source.name} starts a separate pass in "
                            f"rows of {length.seq_len:,}, in addition to the pass in rows of "
                            f"{', '.join(f'{n:,}' for n in sorted(known - {length.seq_len}))}"
                        )
                    known.add(length.seq_len)

    def record(self) -> list[dict[str, Any]]:  # Any: nested JSON
        """Return what the rows of each phase depend on."""
        return [
            {
                "name": phase.name,
                "num_steps": phase.num_steps,
                "tokens_per_step": phase.tokens_per_step,
                "lengths": [
                    {
                        "seq_len": length.seq_len,
                        "share": length.share,
                        "sources": {leaf.source.name: leaf.weight for leaf in length.leaves},
                    }
                    for length in phase.lengths
                ],
            }
            for phase in self.phases
        ]


def single_phase(
    leaves: Sequence[Leaf], seq_len: int, tokens_per_step: int, num_steps: int = 1
) -> Timeline:
    """Return the timeline of a run that reads one blend in rows of one length."""
    length = RowLength(seq_len, 1.0, tuple(leaves))
    return Timeline([Phase("all", num_steps, tokens_per_step, (length,))])


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
    sources: "tuple[Source, ...]"
    first_rows: tuple[int, ...]
    """Rows that each source gave to earlier phases in this length."""

    def rows(self, before: int, rows: slice) -> "Iterator[tuple[Source, tuple[int, int]]]":
        """Yield source, pass and sample of the rows after `before` steps of this mixture."""
        first = before * self.rows_per_step
        for row in range(first, first + self.rows_per_step)[rows]:
            number, index = self.blend.locate(row)
            source = self.sources[number]
            yield source, source.place(self.first_rows[number] + index)


class Mixtures:
    """The mixtures of all phases, and how they alternate where a phase has several lengths."""

    def __init__(self, timeline: Timeline, open_source: "Callable[[str, int], Source]") -> None:
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
