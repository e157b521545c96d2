"""Which beginnings several texts have in common, so that a model reads each of them once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

Tokens = tuple[int, ...]

LEAST_SHARED = 16
"""Tokens that texts must have in common for a call of its own to be worth it."""


@dataclass(frozen=True)
class Scored:
    """A text whose tokens from `start` on are scored; `start` is at least 1."""

    tokens: Tokens
    start: int

    def __post_init__(self) -> None:
        assert 0 < self.start <= len(self.tokens), (self.start, len(self.tokens))


@dataclass
class Leaf:
    """Texts that differ at most in what is not read: the last token, or the last tokens.

    `inputs` are read; of what follows the tokens from `start - 1` on, probabilities are needed.
    """

    inputs: Tokens
    start: int
    members: list[int]
    """Places of the texts in the order in which they came."""

    @property
    def own(self) -> int:
        """How many of the first tokens may be read apart from the others."""
        return self.start - 1


@dataclass
class Stem:
    """A beginning of `length` tokens, and the texts that continue it."""

    length: int
    stems: list["Stem"] = field(default_factory=list)
    leaves: list[Leaf] = field(default_factory=list)

    @property
    def tokens(self) -> Tokens:
        """The beginning itself."""
        inner = self
        while not inner.leaves:
            inner = inner.stems[0]
        return inner.leaves[0].inputs[: self.length]


def grow(texts: Sequence[Scored], least: int = LEAST_SHARED) -> Stem:
    """Return the root, of length 0, of the tree of all texts."""
    leaves = _leaves(texts)
    shared = [0, *(_common(a, b) for a, b in pairwise(leaves))]
    return _stem(leaves, shared, 0, least)


def _leaves(texts: Sequence[Scored]) -> list[Leaf]:
    """Return the texts in the order of their tokens; one leaf for those that one reading serves."""
    order = sorted(range(len(texts)), key=lambda place: texts[place].tokens[:-1], reverse=True)
    leaves: list[Leaf] = []
    for place in order:
        inputs, start = texts[place].tokens[:-1], texts[place].start
        last = leaves[-1] if leaves else None
        if last and last.start == start and last.inputs[: len(inputs)] == inputs:
            last.members.append(place)
        else:
            leaves.append(Leaf(inputs, start, [place]))
    return leaves[::-1]


def _common(one: Leaf, other: Leaf) -> int:
    """Return the number of first tokens that two texts share and that neither scores."""
    most = min(one.own, other.own)
    if one.inputs[:most] == other.inputs[:most]:
        return most
    pairs = zip(one.inputs[:most], other.inputs[:most], strict=True)
    return next(place for place, (a, b) in enumerate(pairs) if a != b)


def _stem(leaves: list[Leaf], shared: list[int], length: int, least: int) -> Stem:
    """Return the stem of texts whose neighbors share `shared` first tokens."""
    stem, first = Stem(length), 0
    for end in range(1, len(leaves) + 1):
        if end < len(leaves) and shared[end] >= length + least:
            continue
        if end - first == 1:
            stem.leaves.append(leaves[first])
        else:
            inner = min(shared[first + 1 : end])
            stem.stems.append(_stem(leaves[first:end], shared[first:end], inner, least))
        first = end
    return stem
