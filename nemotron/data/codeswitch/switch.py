"""Sentences that switch: words replaced by translations, or segments where no alignment crosses.

Source: Bhat et al. 2016, "Grammatical Constraints on Intra-sentential Code-Switching"; Pratapa et
al. 2018, "Language Modeling for Code-Mixing" (ACL); microsoft/CodeMixed-Text-Generator.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

from nemotron.data.codeswitch.links import Link, cuts
from nemotron.data.codeswitch.measures import UNIVERSAL, Measures, measure
from nemotron.data.codeswitch.words import Lexicon, is_of_language, languages_of
from nemotron.data.correct.grammar import below
from nemotron.data.correct.mixed import join_mixed

DRAWS = 4
"""Sentences that are drawn for each one that is kept."""


@dataclass(frozen=True)
class Segment:
    """Words of a sentence, and the words that may take their place."""

    start: int
    stop: int
    words: tuple[str, ...]


@dataclass(frozen=True)
class Switched:
    """A sentence that switches between two languages."""

    words: tuple[str, ...]
    languages: tuple[str, ...]
    """Of each word."""

    @property
    def text(self) -> str:
        return join_mixed(self.words)

    @property
    def measures(self) -> Measures:
        return measure(self.languages)

    @property
    def share(self) -> float:
        """Share of the words that are not of the commonest language."""
        return self.measures.cmi / 100


@dataclass(frozen=True)
class Rule:
    """How much sentences switch, and which of the drawn ones are kept."""

    languages: tuple[str, str]
    """Of the sentences, and of what is put in."""
    share: float
    """Share of the words to switch."""
    number: int
    """Most sentences that are made of one."""
    spf: tuple[float, float] | None
    """Mean and standard deviation of the share of places that switch in real text; None keeps
    those that are drawn first."""

    def switched(
        self, words: Sequence[str], segments: Sequence[Segment], rng: random.Random
    ) -> list[Switched]:
        """Return different sentences in which some of the segments are replaced."""
        drawn: dict[tuple[str, ...], Switched] = {}
        if segments:
            for _ in range(self.number * (DRAWS if self.spf else 1)):
                made = self._draw(words, segments, rng)
                drawn.setdefault(made.words, made)
        real = [made for made in drawn.values() if made.measures.switches]
        if self.spf is not None:
            real.sort(key=self._unlikeness)  # stable: of equals the one that was drawn first
        return list(islice(real, self.number))

    def _unlikeness(self, made: Switched) -> float:
        assert self.spf is not None
        mean, deviation = self.spf
        return abs(made.measures.i_index - mean) / deviation

    def _draw(
        self, words: Sequence[str], segments: Sequence[Segment], rng: random.Random
    ) -> Switched:
        own = languages_of(words, self.languages)
        wanted = max(1, math.floor(self.share * sum(name != UNIVERSAL for name in own) + 0.5))
        left, chosen, count = list(segments), [], 0
        while left and count < wanted:
            segment = left.pop(below(rng, len(left)))
            chosen.append(segment)
            count += segment.stop - segment.start
        return self._replaced(words, own, chosen)

    def _replaced(
        self, words: Sequence[str], own: Sequence[str], chosen: Sequence[Segment]
    ) -> Switched:
        new, languages, at = list[str](), list[str](), 0
        for segment in sorted(chosen, key=lambda segment: segment.start):
            new += [*words[at : segment.start], *segment.words]
            languages += own[at : segment.start]
            languages += [
                self.languages[1] if is_of_language(word) else UNIVERSAL for word in segment.words
            ]
            at = segment.stop
        return Switched((*new, *words[at:]), (*languages, *own[at:]))


def insertions(words: Sequence[str], lexicon: Lexicon) -> Iterator[Segment]:
    """Yield the words that have a translation which may take their place."""
    for place, word in enumerate(words):
        if word in lexicon.translations:
            yield Segment(place, place + 1, tuple(lexicon.translations[word].split()))


def equivalents(
    source: Sequence[str], target: Sequence[str], links: Sequence[Link]
) -> Iterator[Segment]:
    """Yield the shortest segments that may switch: no link crosses their ends."""
    places = list(cuts(len(source), len(target), links))
    for first, last in pairwise(places):
        if first.target < last.target:
            yield Segment(first.source, last.source, tuple(target[first.target : last.target]))
