"""A pair as people write it: candidates of a recognizer, and the text that is right."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import Field

from nemotron.data.correct.pairs import MOST_CANDIDATES
from nemotron.section import Section

MOST_CHARACTERS = 2_000
"""Of a text: alignment takes time and memory by the product of two lengths."""
LARGEST_SCORE = 1e30
ONE = "Correct this text:"
SEVERAL = "Write the text that these candidates stand for, the likeliest first:"


Form = Literal["rows", "chat"]
FORMS: tuple[Form, ...] = get_args(Form)


class PairOptions(Section):
    """How pairs become shards."""

    form: Form = "rows"
    """rows: aligned candidates for parallel correction; chat: conversations."""
    candidates: int = Field(4, ge=1, le=MOST_CANDIDATES)
    """Candidates of every pair in the shards."""
    language: str | None = None
    """Whose sounds align tokens; absent: that of each pair, else the letters."""


@dataclass(frozen=True)
class Pair:
    """Candidates of one utterance, the best one first, and what was said."""

    id: str
    candidates: tuple[str, ...]
    target: str | None
    """None in input that has no right text yet."""
    scores: tuple[tuple[float, ...], ...] | None
    """Log probability of each token of each candidate."""
    language: str | None

    def exactly(self, count: int) -> tuple[str, ...]:
        """Return so many candidates: the first ones, and the first again where there are fewer."""
        missing = count - len(self.candidates)
        return (*self.candidates[:count], *[self.candidates[0]] * missing)

    def check_scores(self, lengths: Sequence[int]) -> None:
        """Check that candidates of these lengths in tokens have a score for each token.

        Raises:
            ValueError: when one has more or fewer.
        """
        for scores, length in zip(self.scores or (), lengths, strict=False):
            if len(scores) != length:
                raise ValueError(f"has {len(scores)} scores for {length} tokens")


def pair_of(row: Mapping[str, Any], *, targets: bool = True) -> Pair:  # Any: what a row holds
    """Return the pair that a row holds; without `targets` it may lack the right text.

    Raises:
        ValueError: when it is none, in one sentence.
    """
    target, candidates, scores = row.get("target"), row.get("candidates"), row.get("scores")
    if target is None and targets:
        raise ValueError("has no target, the text that is right")
    if target is not None and not (isinstance(target, str) and target.strip()):
        raise ValueError("has a target that is not text or is empty")
    if not isinstance(candidates, list) or not candidates:
        raise ValueError("has no list of candidates")
    for number, candidate in enumerate(candidates):
        if not isinstance(candidate, str):
            raise ValueError(f"has a candidate that is not text: candidates[{number}]")
    if not any(candidate.strip() for candidate in candidates):
        raise ValueError("has only empty candidates")
    for text in (target or "", *candidates):
        _check_characters(text)
        if len(text) > MOST_CHARACTERS:
            raise ValueError(
                f"has a text of {len(text):,} characters, at most {MOST_CHARACTERS:,} are aligned"
            )
    language = row.get("language")
    return Pair(
        id="" if row.get("id") is None else str(row["id"]),
        candidates=tuple(candidates),
        target=target,
        scores=None if scores is None else _scores(scores, len(candidates)),
        language=language if isinstance(language, str) else None,
    )


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("has a text with a lone surrogate, which is not a character") from None


def _scores(value: Any, count: int) -> tuple[tuple[float, ...], ...]:  # Any: what a row holds
    if not isinstance(value, list) or not all(isinstance(line, list) for line in value):
        raise ValueError("has scores that are not a list of numbers for each candidate")
    for number in (number for line in value for number in line):
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not abs(number) <= LARGEST_SCORE:
            raise ValueError(f"has a score that is not a number: {number!r:.40}")
    if len(value) != count:
        raise ValueError(f"has scores of {len(value)} candidates for {count} candidates")
    return tuple(tuple(float(number) for number in line) for line in value)


def prompt_of(candidates: Sequence[str]) -> str:
    """Return the question to a model that writes the corrected text as its answer."""
    lines = [candidate.strip() for candidate in candidates]
    return "\n".join([ONE if len(lines) == 1 else SEVERAL, *lines])
