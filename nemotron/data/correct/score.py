"""Measures of corrected text: error rates, precision and recall of its edits, and oracles."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from nemotron.data.correct.align import Alignment, align, columns_of
from nemotron.data.correct.distance import count_edits
from nemotron.data.correct.edits import (
    changes,
    least_edits_of_columns,
    touched,
    vote,
)
from nemotron.data.correct.mixed import split_mixed
from nemotron.data.correct.pair import Pair


@dataclass
class Rate:
    """Edits in relation to the tokens of the reference, over a corpus."""

    edits: int = 0
    tokens: int = 0

    def add(self, edits: int, tokens: int) -> None:
        self.edits += edits
        self.tokens += tokens

    @property
    def value(self) -> float:
        """Edits per token; of a reference without tokens, the number of insertions."""
        return self.edits / self.tokens if self.tokens else float(self.edits)


@dataclass
class Found:
    """What was found, of what there was to find."""

    right: int = 0
    wrong: int = 0
    missed: int = 0

    def add(self, found: set[object], gold: set[object]) -> None:
        self.right += len(found & gold)
        self.wrong += len(found - gold)
        self.missed += len(gold - found)

    @property
    def precision(self) -> float:
        """Share of what was found that is right; 1 where nothing wrong was found."""
        return self.right / (self.right + self.wrong) if self.wrong else 1.0

    @property
    def recall(self) -> float:
        """Share of what there was that was found; 1 where nothing was missed."""
        return self.right / (self.right + self.missed) if self.missed else 1.0

    def f(self, beta: float) -> float:
        """Return the mean of both in which recall weighs `beta` times as much as precision.

        Source: chrisjbryant/errant: errant/commands/compare_m2.py.
        """
        both = beta * beta * self.precision + self.recall
        return (1 + beta * beta) * self.precision * self.recall / both if both else 0.0


@dataclass
class Rates:
    """Three error rates of the same texts."""

    wer: Rate = field(default_factory=Rate)
    """Of words between spaces."""
    cer: Rate = field(default_factory=Rate)
    """Of characters, spaces included."""
    ter: Rate = field(default_factory=Rate)
    """Of mixed tokens: characters of scripts without spaces, and other words."""

    def add(self, text: str, target: str) -> None:
        self.wer.add(count_edits(text.split(), target.split()), len(target.split()))
        self.cer.add(count_edits(text.strip(), target.strip()), len(target.strip()))
        self.ter.add(*_edits(split_mixed(text), split_mixed(target)))


@dataclass(frozen=True)
class Answer:
    """What a model made of a pair."""

    text: str
    selected: str | None = None
    """Its choice among candidates before it rewrote anything."""
    ms: float | None = None
    """Time that it took."""
    judged: tuple[tuple[str, float], ...] = ()
    """Tokens of the choice with their log-probabilities, where a model gave them."""


@dataclass
class Score:
    """All measures over a corpus."""

    sentences: int = 0
    source: Rates = field(default_factory=Rates)
    """Of the first candidate, uncorrected."""
    selected: Rates = field(default_factory=Rates)
    answer: Rates = field(default_factory=Rates)
    vote: Rate = field(default_factory=Rate)
    """TER of the majority of each column."""
    candidate_oracle: Rate = field(default_factory=Rate)
    """TER of the best candidate of each pair."""
    column_oracle: Rate = field(default_factory=Rate)
    """TER of the best choice of a candidate in each column."""
    correction: Found = field(default_factory=Found)
    detection: Found = field(default_factory=Found)
    worse: int = 0
    """Sentences with more edits than the first candidate had."""
    better: int = 0
    times: list[float] = field(default_factory=list)

    def add(self, pair: Pair, answer: Answer) -> None:
        """Count a sentence."""
        assert pair.target is not None
        self.sentences += 1
        self.source.add(pair.candidates[0], pair.target)
        self.answer.add(answer.text, pair.target)
        if answer.selected is not None:
            self.selected.add(answer.selected, pair.target)
        if answer.ms is not None:
            self.times.append(answer.ms)
        candidates = [split_mixed(text) for text in pair.candidates]
        target = split_mixed(pair.target)
        self._add_oracles(candidates, target)
        self._add_edits(candidates[0], split_mixed(answer.text), target)

    def _add_oracles(self, candidates: Sequence[list[str]], target: list[str]) -> None:
        columns = columns_of(candidates, str.lower)
        best = min(count_edits(tokens, target) for tokens in candidates)
        self.candidate_oracle.add(best, len(target))
        self.column_oracle.add(least_edits_of_columns(columns, target), len(target))
        self.vote.add(*_edits(vote(columns), target))

    def _add_edits(self, source: list[str], text: list[str], target: list[str]) -> None:
        mine, right = (_to(source, other) for other in (text, target))
        self.correction.add(set(changes(mine, source, text)), set(changes(right, source, target)))
        self.detection.add(set(touched(mine, source, text)), set(touched(right, source, target)))
        before, after = right.edits, count_edits(text, target)
        self.worse += after > before
        self.better += after < before

    def described(self) -> dict[str, float | int | None]:
        """Return every measure by its name."""
        rates = {"source": self.source, "answer": self.answer}
        if self.selected.cer.tokens:
            rates["selected"] = self.selected
        found: dict[str, float | int | None] = {"sentences": self.sentences}
        for name, each in rates.items():
            for unit in ("wer", "cer", "ter"):
                found[f"{name}_{unit}"] = getattr(each, unit).value
        found |= {
            "vote_ter": self.vote.value,
            "candidate_oracle_ter": self.candidate_oracle.value,
            "column_oracle_ter": self.column_oracle.value,
            "correction_precision": self.correction.precision,
            "correction_recall": self.correction.recall,
            "correction_f0.5": self.correction.f(0.5),
            "detection_precision": self.detection.precision,
            "detection_recall": self.detection.recall,
            "detection_f1": self.detection.f(1.0),
            "sentences_better": self.better,
            "sentences_worse": self.worse,
        }
        if self.times:
            found["median_ms"] = statistics.median(self.times)
        return found


def score(pairs: Iterable[tuple[Pair, Answer]]) -> Score:
    """Return the measures of answers to pairs."""
    total = Score()
    for pair, answer in pairs:
        total.add(pair, answer)
    return total


def _edits(text: Sequence[str], target: Sequence[str]) -> tuple[int, int]:
    return count_edits(text, target), len(target)


def _to(source: list[str], text: list[str]) -> Alignment:
    return align(source, text, str.lower)
