"""How well held-out pairs are corrected: error rates before, after the choice, and after."""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from nemotron.data.correct.marks import Marks
from nemotron.data.correct.pairs import PairRow
from nemotron.posttrain.correct.labels import column_labels
from nemotron.posttrain.correct.run import Answer, Corrector, Source
from nemotron.posttrain.correct.threshold import Threshold, best_threshold


@dataclass(frozen=True)
class Errors:
    """Edits in tokens, and the tokens of the targets."""

    source: int = 0
    selected: int = 0
    answer: int = 0
    tokens: int = 0
    durations: int = 0
    """Tokens of all candidates whose duration was predicted."""
    right_durations: int = 0

    def __add__(self, other: "Errors") -> "Errors":
        return Errors(*map(operator.add, astuple(self), astuple(other)))

    def metrics(self) -> dict[str, float]:
        """Return the error rates: of the first candidate, of the choice and of the answer."""
        tokens = max(1, self.tokens)
        found = {
            "validation/source_error_rate": self.source / tokens,
            "validation/selected_error_rate": self.selected / tokens,
            "validation/error_rate": self.answer / tokens,
        }
        if self.durations:
            found["validation/duration_accuracy"] = self.right_durations / self.durations
        return found


def errors_of(row: PairRow, answer: Answer, marks: Marks, max_duration: int) -> Errors:
    """Compare an answer with the target, and durations up to the longest that is predicted."""
    target, first = row.target.tolist(), row.columns[0]
    return Errors(
        distance(first[first != marks.void].tolist(), target),
        distance(answer.selected, target),
        distance(answer.tokens, target),
        len(target),
        *_durations(row, answer, marks, max_duration),
    )


def _durations(row: PairRow, answer: Answer, marks: Marks, longest: int) -> tuple[int, int]:
    """Return how many durations were predicted, and how many of them are right."""
    if answer.durations is None:
        return 0, 0
    is_token = row.columns != marks.void
    right = answer.durations == row.durations.clip(max=longest)
    return int(is_token.sum()), int((right & is_token).sum())


def judged(
    rows: Sequence[PairRow], answers: Sequence[Answer], marks: Marks
) -> Iterator[tuple[float, bool]]:
    """Yield the score of each chosen token, and whether it is wrong."""
    for row, answer in zip(rows, answers, strict=True):
        if answer.scores is None or answer.columns is None:
            continue
        labels = column_labels(row, marks.void)
        at = answer.columns != marks.void
        wrong = (answer.columns != labels)[at]
        yield from zip(answer.scores[at].tolist(), wrong.tolist(), strict=True)


def find_threshold(found: Sequence[tuple[float, bool]]) -> Threshold:
    """Return the best threshold for judged tokens."""
    scores = np.array([score for score, _ in found], np.float64)
    return best_threshold(scores, np.array([wrong for _, wrong in found], np.bool_))


def correct_rows(corrector: Corrector, rows: Sequence[PairRow]) -> list[Answer]:
    """Correct pairs that are aligned already."""
    return corrector.correct([Source(row.columns) for row in rows])


def distance(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Return the least number of tokens to insert, delete or replace."""
    row = np.arange(len(theirs) + 1)
    places, right = np.arange(len(theirs) + 1), np.asarray(theirs, np.int64)
    for token in ours:
        step = np.minimum(row[1:] + 1, row[:-1] + (right != token))
        # insertions go along the row: a running minimum of what each place leaves
        row = np.minimum.accumulate(np.concatenate([[row[0] + 1], step]) - places) + places
    return int(row[-1])
