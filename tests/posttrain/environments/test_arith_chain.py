"""Right and wrong answers to chains, and answers that try to earn the reward otherwise."""

from typing import Any

import pytest

from nemotron.posttrain.environments.arith_chain import ArithChain
from nemotron.posttrain.environments.base import BadRow, build_row
from tests.support.verdicts import assert_enough, assert_good_rows, judge

RIGHT: list[tuple[Any, str]] = [
    ("7", "7"),
    (7, "7"),
    ("7", " 7 "),
    ("7", "7\n"),
    ("7", "+7"),
    ("7", "007"),
    ("-7", "-7"),
    (-7, "-7"),
    ("0", "0"),
    ("0", "-0"),
    ("3/4", "3/4"),
    ("3/4", "6/8"),
    ("2", "4/2"),
    ("7", "\\boxed{7}"),
    ("7", "3 + 4 = \\boxed{7}"),
    ("7", "\\boxed{ 7 }"),
    ("7", "first \\boxed{6}, no: \\boxed{7}"),
    ("-12", "The sum is \\boxed{-12}."),
    ("3/4", "so \\boxed{9/12}"),
    ("1000000", "\\boxed{1000000}"),
    ("7", "\\boxed{7} because 3 + 4 is not 8"),
    ("7", "\\boxed{1}" * 20 + "\\boxed{7}"),
]
WRONG: list[tuple[Any, str]] = [
    ("7", "8"),
    ("7", "-7"),
    ("7", ""),
    ("7", "   "),
    ("7", "seven"),
    ("7", "7.5"),
    ("7", "70"),
    ("7", "1/7"),
    ("7", "The answer is 7"),
    ("7", "7 apples"),
    ("7", "\\boxed{8}"),
    ("7", "\\boxed{7} no, \\boxed{8}"),
    ("7", "\\boxed{}"),
    ("7", "7 = \\boxed{8}"),
    ("3/4", "4/3"),
    ("3/4", "0.75"),
    ("0", "/"),
    ("7", "x"),
    ("-7", "\\boxed{7}"),
    ("7", "\\boxed{7/2}"),
    ("7", "7 7"),
]
HACKS: list[tuple[Any, str]] = [
    ("7", "6 7 8"),
    ("7", "\\boxed{6, 7, 8}"),
    ("7", "\\boxed{6 or 7}"),
    ("7", "\\boxed{7"),
    ("7", "\\boxed{7} \\boxed{"),
    ("7", "\\boxed{3+4}"),
    ("7", "3+4"),
    ("7", "7" * 65),
    ("7", "\\boxed{" + "0" * 70 + "7}"),
    ("7", "\uff17"),
    ("7", "\u0667"),
    ("7", "\\boxed{expected_answer}"),
    ("7", "\\boxed{7}\\boxed{8}\\boxed{9}"),
    ("7", "7/0"),
    ("7", "\\boxed{7/1/1}"),
    ("7", "1e1"),
]


def reward(expected: Any, answer: str) -> float:
    return judge(ArithChain(), build_row("arith_chain", "?", expected_answer=expected), answer)


@pytest.mark.parametrize(("expected", "answer"), RIGHT)
def test_a_right_answer_earns_one(expected: Any, answer: str):
    assert reward(expected, answer) == 1


@pytest.mark.parametrize(("expected", "answer"), [*WRONG, *HACKS])
def test_a_wrong_answer_earns_nothing(expected: Any, answer: str):
    assert reward(expected, answer) == 0


def test_the_tables_are_long_enough():
    assert_enough(RIGHT, WRONG, HACKS)


def test_rows_are_good():
    assert_good_rows(ArithChain())


def test_the_stated_answers_are_the_values_of_the_chains():
    for level in (0, 1, 2.5, 5):
        for row in ArithChain().rows(20, 1, level):
            total = sum_of(row["question"])
            assert reward(row["expected_answer"], str(total)) == 1
            assert reward(row["expected_answer"], str(total + 1)) == 0


def sum_of(chain: str) -> int:
    """Add up a chain by another way than the generator's: signs first, then factors."""
    total = 0
    for term in chain.replace("-", "+-").split("+"):
        product = 1
        for factor in term.split("*"):
            product *= int(factor)
        total += product
    return total


def test_levels_are_mixed_in_proportion():
    rows = list(ArithChain().rows(200, 2, 0.25))
    terms = [1 + sum(map(row["question"].count, "+-*")) for row in rows]
    assert set(terms) == {2, 3}
    assert 25 <= terms.count(3) <= 75


def test_a_row_without_a_number_is_refused():
    for expected in ("seven", "", None, [7]):
        with pytest.raises(BadRow, match="expected_answer"):
            ArithChain().check(build_row("arith_chain", "?", expected_answer=expected))
    with pytest.raises(BadRow, match="expected_answer is absent"):
        ArithChain().check(build_row("arith_chain", "?"))
