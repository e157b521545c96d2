"""Alignment of candidates with each other and with the target, as FastCorrect 2 does it.

Of all alignments with the fewest edits, those with most equal tokens, and of these the one whose
tokens sound most alike.

Source: Leng et al. 2021, "FastCorrect 2" (arXiv 2109.14420); microsoft/NeuralSpeech:
FastCorrect2/eval_data/align_test_offline.py. Where it asks counts of n-grams to which neighbor an
inserted token belongs, we ask for the nearest.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Generic, TypeVar

from nemotron.data.correct.sound import distance

Token = TypeVar("Token", bound=Hashable)
EDIT, MATCH = 10**6, 10**3
"""Weights of `Alignment.cost`."""


@dataclass(frozen=True)
class Alignment:
    """Which tokens of two texts stand for each other."""

    pairs: tuple[tuple[int | None, int | None], ...]
    """Positions in the first and second text, in order; None where a text has no token."""
    edits: int
    matches: int
    """Pairs of equal tokens."""
    distance: int
    """Of the sounds; a token without a partner counts the length of its sound."""

    @property
    def cost(self) -> int:
        """Edits, matches and distance as one number."""
        return self.edits * EDIT - self.matches * MATCH + self.distance


@dataclass(frozen=True)
class Columns(Generic[Token]):
    """Candidates under each other."""

    anchor: int
    """The candidate along which the others are aligned."""
    lines: tuple[tuple[Token | None, ...], ...]
    """The tokens of each candidate, all of one length; None is a void."""


class _Costs(Generic[Token]):
    """What it costs to pair tokens of two texts, or to leave one without a partner."""

    def __init__(
        self, first: Sequence[Token], second: Sequence[Token], sound: Callable[[Token], str]
    ) -> None:
        self.first, self.second = first, second
        self._sounds = [sound(token) for token in first], [sound(token) for token in second]
        # one number orders edits, matches and distances while none of them reaches the next weight
        longest = sum(len(text) for side in self._sounds for text in side)
        self._match = max(MATCH, 1 + longest)
        self._edit = self._match * max(EDIT // MATCH, 1 + len(first) + len(second))
        self.alone = [[self._edit + len(text) for text in side] for side in self._sounds]
        """Of each token of the first and of the second text."""

    def distance(self, i: int, j: int) -> int:
        return distance(self._sounds[0][i], self._sounds[1][j])

    def pair(self, i: int, j: int) -> int:
        if self.first[i] == self.second[j]:
            return -self._match
        return self._edit + self.distance(i, j)

    def table(self) -> list[list[int]]:
        """Return the least cost of every beginning of one text with every one of the other."""
        rows = [[0]]
        for gap in self.alone[1]:
            rows[0].append(rows[0][-1] + gap)
        match, edit, mates = self._match, self._edit, self.second
        for token, own, lost in zip(self.first, self._sounds[0], self.alone[0], strict=True):
            above, left = rows[-1], rows[-1][0] + lost
            row = [left]
            apart = map(distance, repeat(own), self._sounds[1])
            steps = [
                -match if token == mate else edit + far
                for mate, far in zip(mates, apart, strict=True)
            ]
            # min() of three numbers takes longer than all the rest
            for corner, up, step, added in zip(
                above, above[1:], steps, self.alone[1], strict=False
            ):
                left += added
                if up + lost < left:
                    left = up + lost
                if corner + step < left:
                    left = corner + step
                row.append(left)
            rows.append(row)
        return rows

    def lengths_alone(self, pairs: Sequence[tuple[int | None, int | None]]) -> int:
        """Return the length of the sounds of all tokens without a partner."""
        lost = sum(len(self._sounds[0][i]) for i, j in pairs if i is not None and j is None)
        return lost + sum(len(self._sounds[1][j]) for i, j in pairs if i is None and j is not None)


def align(
    first: Sequence[Token], second: Sequence[Token], sound: Callable[[Token], str]
) -> Alignment:
    """Return the best alignment of two texts.

    Of equally good ones a pair of tokens comes before a void in the second text, and this before a
    void in the first, looked at from the end.
    """
    if list(first) == list(second):
        return Alignment(tuple((i, i) for i in range(len(first))), 0, len(first), 0)
    # no alignment is better, or looked at before, than one that pairs equal ends
    ends = 0
    while ends < min(len(first), len(second)) and first[-1 - ends] == second[-1 - ends]:
        ends += 1
    lengths = len(first) - ends, len(second) - ends
    costs = _Costs(first[: lengths[0]], second[: lengths[1]], sound)
    pairs = _trace(costs)
    both = [(i, j) for i, j in pairs if i is not None and j is not None]
    matches = sum(first[i] == second[j] for i, j in both)
    apart = sum(costs.distance(i, j) for i, j in both if first[i] != second[j])
    edits, apart = len(pairs) - matches, apart + costs.lengths_alone(pairs)
    tail = tuple((lengths[0] + i, lengths[1] + i) for i in range(ends))
    return Alignment(pairs + tail, edits, matches + ends, apart)


def _trace(costs: _Costs[Token]) -> tuple[tuple[int | None, int | None], ...]:
    """Follow the table of least costs from its end to its beginning."""
    rows = costs.table()
    i, j = len(costs.first), len(costs.second)
    pairs: list[tuple[int | None, int | None]] = []
    while i or j:
        if i and j and rows[i][j] == rows[i - 1][j - 1] + costs.pair(i - 1, j - 1):
            i, j = i - 1, j - 1
            pairs.append((i, j))
        elif i and rows[i][j] == rows[i - 1][j] + costs.alone[0][i - 1]:
            i -= 1
            pairs.append((i, None))
        else:
            j -= 1
            pairs.append((None, j))
    return tuple(reversed(pairs))


def columns_of(
    candidates: Sequence[Sequence[Token]], sound: Callable[[Token], str]
) -> Columns[Token]:
    """Put candidates under each other along the one with most tokens, then most characters.

    Among equals that is the first, which a recognizer likes best. What a candidate has between two
    tokens of the anchor fills the voids there from the left.
    """
    sizes = [(len(tokens), sum(len(str(token)) for token in tokens)) for tokens in candidates]
    anchor = sizes.index(max(sizes))
    num_anchors = len(candidates[anchor])
    matched: list[list[Token | None]] = []
    between: list[list[list[Token]]] = []
    for tokens in candidates:
        matched.append([None] * num_anchors)
        between.append([[] for _ in range(num_anchors + 1)])
        place = 0
        for i, j in align(candidates[anchor], tokens, sound).pairs:
            if i is not None:
                matched[-1][i] = None if j is None else tokens[j]
                place = i + 1
            elif j is not None:
                between[-1][place].append(tokens[j])
    widths = [max(len(gaps[place]) for gaps in between) for place in range(num_anchors + 1)]
    lines = [_line(own, gaps, widths) for own, gaps in zip(matched, between, strict=True)]
    return Columns(anchor, tuple(lines))


def _line(
    matched: Sequence[Token | None], between: Sequence[Sequence[Token]], widths: list[int]
) -> tuple[Token | None, ...]:
    line: list[Token | None] = []
    for place, width in enumerate(widths):
        line += [*between[place], *[None] * (width - len(between[place]))]
        line += matched[place : place + 1]
    return tuple(line)


def durations_of(
    source: Sequence[Token], target: Sequence[Token], sound: Callable[[Token], str]
) -> list[int]:
    """Return for each source token the number of target tokens that it stands for.

    They sum to the length of the target unless the source is empty. Target tokens without a source
    token join the neighbor that is wrong already; where both or neither is, they are divided so
    that the sounds fit best, then as evenly as possible, then to the left.
    """
    partners: list[list[int]] = [[] for _ in source]
    inserted: list[list[int]] = [[] for _ in range(len(source) + 1)]
    place = 0
    for i, j in align(source, target, sound).pairs:
        if i is not None:
            partners[i] += [] if j is None else [j]
            place = i + 1
        elif j is not None:
            inserted[place].append(j)
    durations = [len(partner) for partner in partners]
    for place, extra in enumerate(inserted):
        if extra and source:
            left = _share_of_left(place, extra, partners, source, target, sound)
            if left:
                durations[place - 1] += left
            if left < len(extra):
                durations[place] += len(extra) - left
    return durations


def _share_of_left(
    place: int,
    extra: list[int],
    partners: list[list[int]],
    source: Sequence[Token],
    target: Sequence[Token],
    sound: Callable[[Token], str],
) -> int:
    """Return how many of the target tokens before a source token join the one on its left."""
    if place in (0, len(source)):
        return len(extra) if place else 0
    wrong = [
        [source[at]] != [target[j] for j in partners[at]] for at in (place - 1, place)
    ]  # on the left, on the right
    if wrong[0] != wrong[1]:
        return len(extra) if wrong[0] else 0

    def misfit(left: int) -> tuple[int, float, int]:
        joined = [*partners[place - 1], *extra[:left]], [*extra[left:], *partners[place]]
        heard = ["".join(sound(target[j]) for j in side) for side in joined]
        apart = distance(sound(source[place - 1]), heard[0])
        apart += distance(sound(source[place]), heard[1])
        return apart, abs(left - len(extra) / 2), -left

    return min(range(len(extra) + 1), key=misfit)


def row_durations(line: Sequence[Token | None], durations: Sequence[int]) -> list[int]:
    """Return the durations of a candidate's tokens at their columns, 0 at voids."""
    left = iter(durations)
    return [0 if token is None else next(left) for token in line]
