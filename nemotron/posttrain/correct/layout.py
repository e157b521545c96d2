"""A pair as tokens of a row with their labels: the source, its further readings, the slots.

Kinds tag and ctc: `<s> C <sep> S </s>`; kinds soft and duration: `<s> C <sep> C <sep> S </s>`. C
is the source, a column of K candidates at each place. Slots and marks are K equal tokens; the slots
of kind tag are the columns again. The label of a slot is its own token: nothing is shifted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nemotron.data.batch import NO_LABEL
from nemotron.data.correct.marks import Marks
from nemotron.data.correct.pairs import PairRow
from nemotron.posttrain.correct.config import CorrectOptions
from nemotron.posttrain.correct.labels import column_labels
from nemotron.posttrain.correct.span_ctc import slots_needed

RUN, ANSWER, DETECT, DURATION, WRONG, END = (
    "run",
    "answer",
    "detect",
    "duration",
    "wrong",
    "end",
)
"""Names of `Batch.extras`. Of slots that are answered by a run: its number in the row, and its
target, one token at each slot as far as it goes. Of the second reading: the true token of the
column (kind soft); the duration of each candidate's token and whether it is wrong (kind
duration). At the end of the first reading: the candidate whose answer follows. Elsewhere all are
`NO_LABEL`."""
MOST_COPIES = 8
"""Slots of a token whose target needs more than usual."""


@dataclass(frozen=True)
class Specials:
    """Ids of the tokens that are not text."""

    start: int
    end: int
    marks: Marks


@dataclass
class Example:
    """One pair, laid out; all arrays are as long as `columns`."""

    columns: NDArray[np.int64]
    """[n, K]"""
    labels: NDArray[np.int64]
    """[n]"""
    extras: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """[n] or [n, K]"""

    @property
    def length(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Slot:
    """Slots of one token of a candidate."""

    token: int
    copies: int
    target: list[int]
    is_run: bool
    """Whether they are answered by a run, or the one slot by its label."""


def lay_out(
    row: PairRow,
    options: CorrectOptions,
    specials: Specials,
    random: np.random.Generator,
    pseudo_errors: float,
) -> Example | None:
    """Return a pair as it is learned in one pass, or None if its slots cannot hold its target."""
    labels = column_labels(row, specials.marks.void)
    hidden = _hidden(row, labels, options.mask_rate, random)
    source = np.where(hidden, specials.marks.mask, row.columns).T  # [n, K]
    if options.kind == "tag":
        return _tag(source, labels, specials)
    if options.kind == "ctc":
        slots = feasible(_runs(row, 0, hidden, options, specials))
        return None if slots is None else _answered([source], slots, specials)
    candidate = int(random.integers(row.num_candidates))
    if options.kind == "soft":
        flagged = ~row.is_kept[candidate]
        flagged |= random.random(row.num_columns) < pseudo_errors
        slots = feasible(_flagged(row, candidate, flagged, hidden, options, specials))
        if slots is None:
            return None
        example = _answered([source, source], slots, specials)
        example.extras[DETECT] = _at_second(example, labels)
        return example
    return _repeated(row, candidate, source, hidden, specials)


def _hidden(
    row: PairRow, labels: NDArray[np.int64], rate: float, random: np.random.Generator
) -> NDArray[np.bool_]:
    """Return which columns are hidden; only those that are right in all candidates can be.

    In another candidate a hidden token could be read.
    """
    right = (row.is_kept & (row.columns == labels)).all(0)
    # drawn for every column, so that the rate does not change what else is drawn
    return right & (random.random(row.num_columns) < rate)


def _tag(source: NDArray[np.int64], labels: NDArray[np.int64], specials: Specials) -> Example:
    columns = _join([source, source], specials)
    example = Example(columns, np.full(len(columns), NO_LABEL, np.int64))
    example.labels[-1 - len(labels) : -1] = labels
    return example


def _runs(
    row: PairRow,
    candidate: int,
    hidden: NDArray[np.bool_],
    options: CorrectOptions,
    specials: Specials,
) -> list[Slot]:
    every = np.ones(row.num_columns, np.bool_)
    return _flagged(row, candidate, every, hidden, options, specials)


def _flagged(
    row: PairRow,
    candidate: int,
    flagged: NDArray[np.bool_],
    hidden: NDArray[np.bool_],
    options: CorrectOptions,
    specials: Specials,
) -> list[Slot]:
    """Return the slots of a candidate's tokens; a hole has none."""
    slots = []
    for column, token in enumerate(row.columns[candidate].tolist()):
        if token == specials.marks.void:
            continue
        is_run = bool(flagged[column])
        copies = options.copies if is_run else 1
        shown = specials.marks.mask if hidden[column] else token
        slots.append(Slot(shown, copies, row.target_of(candidate, column).tolist(), is_run))
    return slots


def feasible(slots: Sequence[Slot]) -> list[Slot] | None:
    """Give tokens of a run more copies until it holds its target; None if no number does."""
    found: list[Slot] = []
    run: list[Slot] = []
    for slot in [*slots, None]:
        if slot is not None and slot.is_run:
            run.append(slot)
            continue
        needed = slots_needed([token for each in run for token in each.target])
        if run and (missing := needed - sum(each.copies for each in run)) > 0:
            more = -(-missing // len(run))
            if max(each.copies for each in run) + more > MOST_COPIES:
                return None
            run = [Slot(s.token, s.copies + more, s.target, True) for s in run]
        found += run
        run = []
        if slot is not None:
            found.append(slot)
    return found


def _answered(
    readings: list[NDArray[np.int64]], slots: Sequence[Slot], specials: Specials
) -> Example:
    """Return readings and slots, with labels at kept slots and numbered runs at the others."""
    repeated = [slot.token for slot in slots for _ in range(slot.copies)]
    columns = _join([*readings, _alike(repeated, readings[0].shape[1])], specials)
    example = Example(columns, np.full(len(columns), NO_LABEL, np.int64))
    run, answer = np.full((2, len(columns)), NO_LABEL, np.int64)
    place = len(columns) - 1 - len(repeated)
    number, begin, target = -1, place, list[int]()
    for before, slot in zip([None, *slots], slots, strict=False):
        if not slot.is_run:
            example.labels[place] = slot.target[0]
        else:
            if before is None or not before.is_run:
                number, begin, target = number + 1, place, []
            run[place : place + slot.copies] = number
            target += slot.target
            answer[begin : begin + len(target)] = target
        place += slot.copies
    example.extras |= {RUN: run, ANSWER: answer}
    return example


def _repeated(
    row: PairRow,
    candidate: int,
    source: NDArray[np.int64],
    hidden: NDArray[np.bool_],
    specials: Specials,
) -> Example:
    """Return the example of kind duration: each token as often as it has target tokens."""
    shown = np.where(hidden, specials.marks.mask, row.columns[candidate])
    repeated = np.repeat(shown, row.durations[candidate]).tolist()
    columns = _join([source, source, _alike(repeated, source.shape[1])], specials)
    example = Example(columns, np.full(len(columns), NO_LABEL, np.int64))
    example.labels[-1 - len(repeated) : -1] = row.target[: len(repeated)]
    is_void = row.columns == specials.marks.void
    durations = np.where(is_void, NO_LABEL, row.durations)
    wrong = np.where(is_void, NO_LABEL, ~row.is_kept)
    example.extras |= {
        DURATION: _at_second(example, durations.T),
        WRONG: _at_second(example, wrong.T.astype(np.int64)),
    }
    end = np.full(len(columns), NO_LABEL, np.int64)
    end[1 + row.num_columns] = candidate
    example.extras[END] = end
    return example


def second_reading(num_columns: int) -> slice:
    """Return where the source is read for the second time."""
    return slice(num_columns + 2, 2 * num_columns + 2)


def _at_second(example: Example, values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return values of the columns at their second reading."""
    placed = np.full((example.length, *values.shape[1:]), NO_LABEL, np.int64)
    placed[second_reading(len(values))] = values
    return placed


def prefix(source: NDArray[np.int64], readings: int, specials: Specials) -> NDArray[np.int64]:
    """Return what comes before the slots: readings of the source [n, K], each with its mark."""
    return _join([source] * readings, specials, is_open=True)


def _join(
    parts: Sequence[NDArray[np.int64]], specials: Specials, *, is_open: bool = False
) -> NDArray[np.int64]:
    width = parts[0].shape[1]
    joined = [_alike([specials.start], width)]
    for number, part in enumerate(parts):
        is_last = number == len(parts) - 1 and not is_open
        mark = specials.end if is_last else specials.marks.sep
        joined += [part, _alike([mark], width)]
    return np.concatenate(joined)


def _alike(tokens: Sequence[int], width: int) -> NDArray[np.int64]:
    """Return tokens as columns of equal candidates."""
    column = np.asarray(tokens, np.int64).reshape(-1, 1)
    return np.repeat(column, width, axis=1)


def least_length(num_columns: int, target: int, options: CorrectOptions) -> int:
    """Return the fewest tokens that a pair takes in a row."""
    one = num_columns + 1
    if options.kind == "duration":
        return 2 * one + target + 2
    copies = options.copies if options.kind == "ctc" else 1
    return one * (2 if options.kind == "soft" else 1) + copies * num_columns + 2
