"""Pairs as rows: labels of columns, masks, slots and the numbers of their runs."""

import numpy as np
import pytest

from nemotron.data.batch import NO_LABEL
from nemotron.data.correct.pairs import PairRow
from nemotron.posttrain.correct.batches import pack_examples
from nemotron.posttrain.correct.config import CorrectOptions
from nemotron.posttrain.correct.labels import column_labels
from nemotron.posttrain.correct.layout import (
    ANSWER,
    DETECT,
    DURATION,
    END,
    RUN,
    WRONG,
    Example,
    Slot,
    Specials,
    feasible,
    lay_out,
    second_reading,
)
from tests.support.pairs import make_rows, marks

MARKS = marks()
VOID, MASK, SEP = MARKS.void, MARKS.mask, MARKS.sep
SPECIALS = Specials(1, 2, MARKS)
A, B, C, D = 40, 41, 42, 43


def pair(columns: list[list[int]], target: list[int], durations: list[list[int]]) -> PairRow:
    return PairRow(np.array(columns), np.array(target), np.array(durations))


def laid_out(
    row: PairRow, kind: str, seed: int = 0, pseudo: float = 0.0, **more: object
) -> Example:
    options = CorrectOptions.model_validate({"kind": kind, "mask_rate": 0.0, **more})
    example = lay_out(row, options, SPECIALS, np.random.default_rng(seed), pseudo)
    assert example is not None
    return example


@pytest.mark.parametrize(
    ("columns", "target", "durations", "labels"),
    [
        ([[A, B, C]], [A, D, C], [[1, 1, 1]], [A, D, C]),
        ([[A, B, C]], [A, C], [[1, 0, 1]], [A, VOID, C]),
        # of two tokens of one column that stays which is there; the other has no column
        ([[A, C]], [D, A, C], [[2, 1]], [A, C]),
        # a hole of one candidate is the place of what another one has
        ([[A, VOID, C], [A, B, C]], [A, B, C], [[2, 0, 1], [1, 1, 1]], [A, B, C]),
        ([[A, B, VOID], [A, B, D]], [A, B], [[1, 1, 0], [1, 1, 0]], [A, B, VOID]),
    ],
)
def test_each_column_is_labeled_with_its_true_token(
    columns: list, target: list, durations: list, labels: list
) -> None:
    assert column_labels(pair(columns, target, durations), VOID).tolist() == labels


def test_labels_of_columns_give_the_target_back_where_one_candidate_has_a_column_for_each() -> None:
    for row in make_rows(100, 2):
        labels = column_labels(row, VOID)
        if any((d <= 1).all() for d in row.durations):
            assert labels[labels != VOID].tolist() == row.target.tolist()


def test_a_tagged_row_reads_the_columns_twice() -> None:
    row = pair([[A, B, VOID], [A, D, C]], [A, D], [[1, 1, 0], [1, 1, 0]])
    example = laid_out(row, "tag")
    mark = [[1, 1]], [[SEP, SEP]], [[2, 2]]
    assert example.columns.tolist() == [
        *mark[0], [A, A], [B, D], [VOID, C], *mark[1], [A, A], [B, D], [VOID, C], *mark[2]
    ]  # fmt: skip
    assert example.labels.tolist() == [*[NO_LABEL] * 5, A, D, VOID, NO_LABEL]


def test_soft_rows_have_runs_where_tokens_are_wrong_and_labels_elsewhere() -> None:
    row = pair([[A, B, C, D, A]], [A, D, D, B, D, A], [[1, 2, 1, 1, 1]])
    example = laid_out(row, "soft")
    slots = [A, B, B, B, C, C, C, D, A]
    assert example.columns[:, 0].tolist()[-10:] == [*slots, 2]
    n = NO_LABEL
    assert example.labels.tolist()[-10:] == [A, n, n, n, n, n, n, D, A, n]
    assert example.extras[RUN].tolist()[-10:] == [n, 0, 0, 0, 0, 0, 0, n, n, n]
    assert example.extras[ANSWER].tolist()[-10:] == [n, D, D, B, n, n, n, n, n, n]
    detect = example.extras[DETECT][second_reading(5)].tolist()
    assert detect == column_labels(row, VOID).tolist()
    assert (example.extras[DETECT] != n).sum() == 5


def test_pseudo_errors_answer_right_tokens_by_runs_of_their_own() -> None:
    row = pair([[A, B, C]], [A, B, C], [[1, 1, 1]])
    example = laid_out(row, "soft", pseudo=1.0, copies=2)
    assert example.extras[RUN].tolist()[-7:] == [0] * 6 + [NO_LABEL]
    assert example.extras[ANSWER].tolist()[-7:-4] == [A, B, C]


def test_tokens_get_more_copies_until_their_run_holds_its_target() -> None:
    few = [Slot(A, 1, [B, B, C], True), Slot(B, 1, [], True), Slot(C, 1, [C], False)]
    found = feasible(few)
    assert found is not None
    assert [slot.copies for slot in found] == [2, 2, 1]
    assert feasible([Slot(A, 3, [B] * 5, True)]) is None  # it would take 9
    assert feasible([Slot(A, 3, [B] * 4, True)]) is not None


def test_durations_repeat_the_tokens_of_one_candidate() -> None:
    row = pair([[A, VOID, C], [A, B, C]], [A, B, D], [[2, 0, 1], [1, 1, 1]])
    found = {}
    for seed in range(8):
        example = laid_out(row, "duration", seed)
        [end] = example.extras[END][example.extras[END] != NO_LABEL].tolist()
        found[end] = example
    assert set(found) == {0, 1}
    n = NO_LABEL
    assert found[0].columns[:, 0].tolist()[-4:] == [A, A, C, 2]
    assert found[1].columns[:, 0].tolist()[-4:] == [A, B, C, 2]
    for example in found.values():
        assert example.labels.tolist()[-4:] == [A, B, D, n]
        at = second_reading(3)
        assert example.extras[DURATION][at].tolist() == [[2, 1], [n, 1], [1, 1]]
        assert example.extras[WRONG][at].tolist() == [[1, 0], [n, 0], [1, 1]]


@pytest.mark.parametrize("kind", ["tag", "ctc", "soft", "duration"])
def test_masks_hide_right_tokens_only_in_all_readings_and_change_no_label(kind: str) -> None:
    hidden = right = 0
    for number, row in enumerate(make_rows(200, 2)):
        plain, masked = (
            lay_out(row, CorrectOptions(kind=kind, mask_rate=rate), SPECIALS,
                    np.random.default_rng(number), 0.1)
            for rate in (0.0, 0.3)
        )  # fmt: skip
        assert plain is not None
        assert masked is not None
        assert plain.labels.tolist() == masked.labels.tolist()
        assert {n: v.tolist() for n, v in plain.extras.items()} == {
            n: v.tolist() for n, v in masked.extras.items()
        }
        is_hidden = (masked.columns == MASK).any(1)
        assert (masked.columns[is_hidden] == MASK).all()
        changed = (masked.columns != plain.columns).any(1)
        assert changed.tolist() == is_hidden.tolist()
        n = row.num_columns
        first = is_hidden[1 : n + 1]
        agree = (row.columns == column_labels(row, VOID)).all(0) & row.is_kept.all(0)
        assert not (first & ~agree).any()
        if kind != "ctc":
            assert first.tolist() == is_hidden[second_reading(n)].tolist()
        hidden, right = hidden + int(first.sum()), right + int(agree.sum())
    assert hidden / right == pytest.approx(0.3, abs=0.05)


def test_packed_examples_number_their_runs_through_the_row() -> None:
    row = pair([[A, B, C]], [A, D, C], [[1, 1, 1]])
    example = laid_out(row, "soft")
    batch = pack_examples([[example, example], [example]], 31, 2)
    runs = [sorted(set(r.tolist())) for r in batch.extras[RUN]]
    assert runs == [[NO_LABEL, 0, 1], [NO_LABEL, 0]]
    assert batch.padding is not None
    assert batch.padding.sum().item() == 2 * 31 - 3 * example.length
    assert batch.seq_idx is not None
    assert batch.seq_idx[0].unique_consecutive().tolist() == [0, 1, 2]
