"""Candidates with the errors of a recognizer, drawn in the proportions of FastCorrect 2.

A token that is touched is wrong in one candidate for certain and in each other with probability
1/2, so that errors of the candidates come together, as those of a recognizer do.

Source: microsoft/NeuralSpeech: FastCorrect2/scripts/add_noise.py.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from nemotron.data.correct.grammar import below
from nemotron.data.correct.sound import Sound, distance

RATE = 0.2
PUBLISHED = (0.15, 0.22, 0.28, 0.35)
"""Probability of each of four candidates to be the one that is wrong for certain."""
OTHER = 0.5
"""Probability of each other candidate to be touched too."""
SAME_INSERTED = 0.4
"""Probability that another candidate has the same inserted token."""
ANY_TOKEN = 0.1
"""Probability that a token is replaced by any one, not by one that sounds like it."""
RANKS = (6, 5, 5, 4, 4, 3, 3, 3, 2, 2, 2, 1, 1, 1, 1)
"""Weights of the tokens that sound most alike, the nearest first."""
COMPARED = 4000
"""Most frequent tokens among which those that sound alike are searched."""


class Edit(Enum):
    """What happens to a token."""

    SUBSTITUTE = 0
    INSERT_LEFT = 1
    INSERT_RIGHT = 2
    DELETE = 3


CERTAIN = (4 / 7, 1 / 14, 1 / 14, 2 / 7)
"""Probability of each edit in the candidate that is wrong for certain."""
OTHERS = {
    Edit.SUBSTITUTE: CERTAIN,
    Edit.INSERT_LEFT: (4 / 7, 3 / 7, 0.0, 0.0),
    Edit.INSERT_RIGHT: (4 / 7, 0.0, 3 / 7, 0.0),
    Edit.DELETE: (4 / 7, 0.0, 0.0, 3 / 7),
}
"""Probability of each edit in the others, after that in the certain one."""


class Confusions:
    """What a token may be taken for: the tokens of a text that sound most like it."""

    def __init__(self, counts: Counter[str], sound: Sound) -> None:
        self._sound = sound
        self.tokens = sorted(counts, key=lambda token: (-counts[token], token))
        self._heard = [(sound(token), token) for token in self.tokens[:COMPARED]]
        self._known: dict[str, list[str]] = {}

    def of(self, token: str) -> list[str]:
        """Return the tokens that sound most like one, the nearest first; it is not among them."""
        if token not in self._known:
            own = self._sound(token)
            by_distance = sorted(
                (distance(own, other), rank, mate)
                for rank, (other, mate) in enumerate(self._heard)
                if mate != token
            )
            self._known[token] = [mate for _, _, mate in by_distance[: len(RANKS)]]
        return self._known[token]

    def draw(self, token: str, rng: random.Random) -> str:
        """Draw what a token is taken for; another one, if the text has another."""
        if rng.random() < ANY_TOKEN:
            return self.draw_any(rng, token)
        mates = self.of(token)
        return mates[draw(rng, RANKS[: len(mates)])] if mates else token

    def draw_any(self, rng: random.Random, but: str | None = None) -> str:
        """Draw any token but one."""
        tokens = self.tokens
        number = below(rng, len(tokens))
        if tokens[number] == but:
            number = (number + 1) % len(tokens)
        return tokens[number]


@dataclass(frozen=True)
class Noise:
    """Draws candidates of texts."""

    confusions: Confusions
    candidates: int = 4
    rate: float = RATE

    def draw(self, tokens: Sequence[str], rng: random.Random) -> list[list[str]]:
        """Return the candidates of a text, whose errors depend on each other."""
        drawn: list[list[str]] = [[] for _ in range(self.candidates)]
        weights = chances(self.candidates)
        for token in tokens:
            if rng.random() >= self.rate:
                for candidate in drawn:
                    candidate.append(token)
                continue
            certain = draw(rng, weights)
            edit, inserted = Edit(draw(rng, CERTAIN)), self.confusions.draw_any(rng)
            for number, candidate in enumerate(drawn):
                if number == certain:
                    candidate += self._edited(token, edit, inserted, rng)
                elif rng.random() < OTHER:
                    own = Edit(draw(rng, OTHERS[edit]))
                    same = "INSERT" in edit.name and rng.random() < SAME_INSERTED
                    extra = inserted if same else self.confusions.draw_any(rng)
                    candidate += self._edited(token, own, extra, rng)
                else:
                    candidate.append(token)
        return drawn

    def _edited(self, token: str, edit: Edit, inserted: str, rng: random.Random) -> list[str]:
        if edit is Edit.SUBSTITUTE:
            return [self.confusions.draw(token, rng)]
        return {
            Edit.INSERT_LEFT: [inserted, token],
            Edit.INSERT_RIGHT: [token, inserted],
            Edit.DELETE: [],
        }[edit]


def chances(candidates: int) -> tuple[float, ...]:
    """Return the probability of each candidate to be wrong for certain.

    That of four is published; fewer or more rise from the first to the last in the same ratio.
    """
    if candidates == len(PUBLISHED):
        return PUBLISHED
    first, last = PUBLISHED[0], PUBLISHED[-1]
    steps = max(1, candidates - 1)
    raw = [first + (last - first) * number / steps for number in range(candidates)]
    return tuple(weight / sum(raw) for weight in raw)


def draw(rng: random.Random, weights: Sequence[float]) -> int:
    """Draw a number with these weights, the same in every version of Python."""
    left = rng.random() * sum(weights)
    for number, weight in enumerate(weights):
        left -= weight
        if left < 0:
            return number
    return max(number for number, weight in enumerate(weights) if weight)
