"""Right and wrong choices, and answers that try to choose several options at once."""

import re

import pytest

from nemotron.posttrain.environments.base import BadRow, Row, build_row
from nemotron.posttrain.environments.facts import RELATIONS
from nemotron.posttrain.environments.mcqa import MultipleChoice
from tests.support.verdicts import assert_enough, assert_good_rows, judge

STRICT, BOXED, COLON = "strict_single_letter_boxed", "lenient_boxed", "lenient_answer_colon"
# grading mode, answer; B is right
RIGHT = [
    (STRICT, "\\boxed{B}"),
    (STRICT, "The capital is Bern. \\boxed{B}"),
    (STRICT, "\\boxed{ B }"),
    (STRICT, "\\boxed{(B)}"),
    (STRICT, "\\boxed{B.}"),
    (STRICT, "\\boxed{B)}"),
    (STRICT, "\\boxed{\\text{B}}"),
    (STRICT, "\\boxed{\\textbf{B}}"),
    (STRICT, "\\boxed{\\text{(B)}}"),
    (STRICT, "$\\boxed{\\mathrm{B}}$"),
    (STRICT, "\\boxed{A}? No: \\boxed{B}"),
    (STRICT, "A is wrong, C is wrong, so \\boxed{B}, not D."),
    (STRICT, "\\boxed{$B$}"),
    (STRICT, "\\boxed{**B**}"),
    (STRICT, "\\boxed{[B]}"),
    (STRICT, "\\boxed{B: Bern}"),
    (STRICT, "\\boxed{B) Bern}"),
    (BOXED, "\\boxed{B}"),
    (BOXED, "\\boxed{b}"),
    (BOXED, "\\boxed{Bern}"),
    (BOXED, "\\boxed{\\text{bern}}"),
    (BOXED, "\\boxed{  BERN }"),
    (COLON, "Answer: B"),
    (COLON, "answer: Bern"),
    (COLON, "Answer: A\nWait.\nAnswer: (B)"),
    (COLON, "ANSWER : **B**"),
]
WRONG = [
    (STRICT, "\\boxed{A}"),
    (STRICT, "\\boxed{C}"),
    (STRICT, "B"),
    (STRICT, "The answer is B."),
    (STRICT, ""),
    (STRICT, "\\boxed{}"),
    (STRICT, "\\boxed{b}"),
    (STRICT, "\\boxed{Bern}"),
    (STRICT, "\\boxed{A: Bern}"),
    (STRICT, "\\boxed{E: Bern}"),
    (STRICT, "\\boxed{the answer is B: Bern}"),
    (STRICT, "\\boxed{E}"),
    (STRICT, "\\boxed{2}"),
    (STRICT, "\\boxed{B} or rather \\boxed{A}"),
    (STRICT, "\\boxed{B"),
    (STRICT, "(B)"),
    (STRICT, "Answer: B"),
    (BOXED, "\\boxed{a}"),
    (BOXED, "\\boxed{Oslo}"),
    (BOXED, "\\boxed{Berne}"),
    (BOXED, "Bern"),
    (COLON, "Answer: A"),
    (COLON, "Answer: Oslo"),
    (COLON, "Answer:\nB"),
    (COLON, "B"),
]
HACKS = [
    (STRICT, "\\boxed{A or B}"),
    (STRICT, "\\boxed{A, B, C, D}"),
    (STRICT, "\\boxed{ABCD}"),
    (STRICT, "\\boxed{AB}"),
    (STRICT, "\\boxed{B and C}"),
    (STRICT, "\\boxed{B}\\boxed{"),
    (STRICT, "\\boxed{B/C}"),
    (STRICT, "\\boxed{not A}"),
    (STRICT, "\\boxed{\\text{A}\\text{B}}"),
    (STRICT, "\\boxed{expected_answer}"),
    (STRICT, "\\boxed{\\boxed{B} \\boxed{C}}"),
    (BOXED, "\\boxed{Oslo or Bern}"),
    (BOXED, "\\boxed{Oslo, Bern, Rome, Cairo}"),
    (BOXED, "\\boxed{}"),
    (COLON, "Answer: A or B"),
    (COLON, "Answer: Oslo, Bern"),
    (COLON, "Answer: B\nAnswer: A B C D"),
]


def row(mode: str = STRICT, **changes: object) -> Row:
    options = [{"A": "Oslo"}, {"B": "Bern"}, {"C": "Rome"}, {"D": "Cairo"}]
    fields = {"options": options, "expected_answer": "B", "grading_mode": mode}
    return build_row("mcqa", "?", **{**fields, **changes})


@pytest.mark.parametrize(("mode", "answer"), RIGHT)
def test_the_right_letter_earns_one(mode: str, answer: str):
    assert judge(MultipleChoice(), row(mode), answer) == 1


@pytest.mark.parametrize(("mode", "answer"), [*WRONG, *HACKS])
def test_any_other_answer_earns_nothing(mode: str, answer: str):
    assert judge(MultipleChoice(), row(mode), answer) == 0


def test_the_tables_are_long_enough():
    assert_enough(RIGHT, WRONG, HACKS)
    for relation in RELATIONS:
        assert len(relation.pairs) >= 10
        assert len({subject for subject, _ in relation.pairs}) == len(relation.pairs)
        assert len({value for _, value in relation.pairs}) == len(relation.pairs)


def test_rows_are_good():
    assert_good_rows(MultipleChoice())


def test_the_right_letter_is_evenly_spread_and_stands_for_the_right_fact():
    facts = {relation.question.format(a): b for relation in RELATIONS for a, b in relation.pairs}
    rows = list(MultipleChoice().rows(400, 1, 1))
    letters = [each["expected_answer"] for each in rows]
    assert all(70 <= letters.count(letter) <= 130 for letter in "ABCD")
    for each in rows:
        shown = re.findall(
            r"(?m)^([A-D])\. (.*)$", each["responses_create_params"]["input"][0]["content"]
        )
        assert dict(shown)[each["expected_answer"]] == facts[each["question"]]


def test_options_may_have_the_same_text_without_being_right_twice():
    options = [{"A": "Bern"}, {"B": "Bern"}]
    assert judge(MultipleChoice(), row(BOXED, options=options), "\\boxed{Bern}") == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"options": ["Oslo", "Bern"]}, "options contains 'Oslo'"),
        ({"options": "AB"}, "options contains None"),
        ({"options": [{"A": "x"}, {"A": "y"}]}, "options contains"),
        ({"options": [{"AB": "x"}]}, "options contains"),
        ({"expected_answer": "E"}, "expected_answer = 'E'"),
        ({"grading_mode": "kind"}, "grading_mode = 'kind'"),
    ],
)
def test_a_row_that_cannot_be_judged_is_refused(changes: dict[str, object], said: str):
    with pytest.raises(BadRow, match=said):
        MultipleChoice().check(row(**changes))
