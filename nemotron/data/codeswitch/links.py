"""Which words of a sentence and of its translation stand for each other, by IBM's first model.

Links prefer the diagonal, as fast_align's do.

Source: Brown et al. 1993, "The Mathematics of Statistical Machine Translation"; Dyer et al. 2013,
"A Simple, Fast, and Effective Reparameterization of IBM Model 2".
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

ROUNDS = 5
TENSION = 2.0
"""How much a link prefers the diagonal. With 4, from which fast_align starts, five rounds link
words of short sentences by their place alone."""
NOTHING = 0.08
"""Probability before any evidence that a word of the translation stands for no word."""
Sentence = Sequence[str]
Link = tuple[int, int]
"""Positions of a word and of a word of its translation."""


@dataclass(frozen=True)
class Cut:
    """A place in a sentence and in its translation that no link crosses."""

    source: int
    target: int


class Translations:
    """Probabilities of words of a translation, learned from pairs of sentences."""

    def __init__(self, pairs: Sequence[tuple[Sentence, Sentence]], rounds: int = ROUNDS) -> None:
        vocabulary = {word for _, target in pairs for word in target}
        self._least = 1.0 / max(1, len(vocabulary))
        self._table: dict[str | None, dict[str, float]] = {}
        for _ in range(rounds):
            self._learn(pairs)

    def _learn(self, pairs: Sequence[tuple[Sentence, Sentence]]) -> None:
        counts: dict[str | None, dict[str, float]] = {}
        for source, target in pairs:
            for j, word in enumerate(target):
                weights = self._weights(source, target, j)
                whole = sum(weights)
                for mate, weight in zip([*source, None], weights, strict=True):
                    own = counts.setdefault(mate, {})
                    own[word] = own.get(word, 0.0) + weight / whole
        for own in counts.values():
            whole = sum(own.values())
            for word in own:
                own[word] /= whole
        self._table = counts

    def _weights(self, source: Sentence, target: Sentence, j: int) -> list[float]:
        """Return how likely a word of the translation stands for each word, and for none."""
        place = (j + 0.5) / len(target)
        near = [
            math.exp(-TENSION * abs((i + 0.5) / len(source) - place)) for i in range(len(source))
        ]
        whole = sum(near) or 1.0
        word = target[j]
        weights = [
            (1 - NOTHING) * prior / whole * self._probability(mate, word)
            for prior, mate in zip(near, source, strict=True)
        ]
        return [*weights, NOTHING * self._probability(None, word)]

    def _probability(self, mate: str | None, word: str) -> float:
        if not self._table:
            return self._least
        # what was never seen together is unlikely, not impossible
        return self._table.get(mate, {}).get(word, self._least * 1e-6)

    def links(self, source: Sentence, target: Sentence) -> list[Link]:
        """Return the best link of each word of the translation that has one."""
        found = []
        for j in range(len(target) if source else 0):
            weights = self._weights(source, target, j)
            best = max(range(len(weights)), key=weights.__getitem__)
            if best < len(source):
                found.append((best, j))
        return found


def cuts(num_source: int, num_target: int, links: Sequence[Link]) -> Iterator[Cut]:
    """Yield the places that no link crosses, from the first to the last.

    Words of the translation without a link belong to what follows them.
    """
    for i in range(num_source + 1):
        before = max((t + 1 for s, t in links if s < i), default=0)
        after = min((t for s, t in links if s >= i), default=num_target)
        if i == num_source:
            before = num_target
        if before <= after:
            yield Cut(i, before)
