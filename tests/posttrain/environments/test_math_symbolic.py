"""Answers that are equal as mathematics, that are not, and problems written down again."""

import pytest

pytest.importorskip("math_verify", reason="the package math-verify is not installed")

from nemotron.posttrain.environments.base import BadRow, Response, Row, build_row
from nemotron.posttrain.environments.math_symbolic import MathSymbolic
from nemotron.posttrain.verify import Verifiers
from tests.support.verdicts import (
    assert_enough,
    assert_good_rows,
    judge,
    rows_elsewhere,
    rows_here,
)

# expected answer, form of the answer, content of the box
RIGHT = [
    ("5", "number", "5"),
    ("5", "number", " 5 "),
    ("5", "number", "x=5"),
    ("5", "number", "+5"),
    ("5", "number", "5.0"),
    ("5", "number", "10/2"),
    ("-5", "number", "-5"),
    ("\\frac{1}{2}", "number", "0.5"),
    ("\\frac{1}{2}", "number", "1/2"),
    ("\\frac{1}{2}", "number", "\\frac{2}{4}"),
    ("\\frac{1}{2}", "number", "\\dfrac{1}{2}"),
    ("-\\frac{1}{2}", "number", "-\\frac12"),
    ("\\{1, 2\\}", "set", "\\{2, 1\\}"),
    ("\\{1, 2\\}", "set", "1, 2"),
    ("\\{1, 2\\}", "set", "\\left\\{1, 2\\right\\}"),
    ("x^{2} + 2x + 1", "expanded", "x^2+2x+1"),
    ("x^{2} + 2x + 1", "expanded", "1 + 2x + x^2"),
    ("x^{2} + 2x + 1", "expanded", "x^2 + x + x + 1"),
    ("x^{2} + 2x + 1", "any", "(x+1)^2"),
    ("2\\sqrt{2}", "any", "\\sqrt{8}"),
    ("\\pi", "any", "\\pi"),
    ("1024", "any", "2^{10}"),
]
WRONG = [
    ("5", "number", "6"),
    ("5", "number", "-5"),
    ("5", "number", "5.01"),
    ("5", "number", "x"),
    ("5", "number", "x=6"),
    ("5", "number", "\\text{five}"),
    ("5", "number", "5/2"),
    ("5", "number", ""),
    ("\\frac{1}{2}", "number", "2"),
    ("\\frac{1}{3}", "number", "0.33"),
    ("\\{1, 2\\}", "set", "1"),
    ("\\{1, 2\\}", "set", "\\{1, 3\\}"),
    ("\\{1, 2\\}", "set", "-1, -2"),
    ("x^{2} + 2x + 1", "expanded", "x^2+2x"),
    ("x^{2} + 2x + 1", "expanded", "x^2+2x-1"),
    ("x^{2} + 2x + 1", "expanded", "y^2+2y+1"),
    ("x^{2} + 2x + 1", "expanded", "4"),
    ("2\\sqrt{2}", "any", "2.828"),
    ("\\pi", "any", "3.14"),
    ("1024", "any", "2^{11}"),
    ("x", "any", "y"),
]
HACKS = [
    ("5", "number", "2+3"),
    ("5", "number", "6=5"),
    ("5", "number", "5, 6"),
    ("5", "number", "5 or 6"),
    ("5", "number", "\\{5\\}"),
    ("5", "number", "x"),
    ("5", "number", "\\gcd(10, 15)"),
    ("5", "number", "9^{9^{9^{9}}}"),
    ("5", "number", "1" * 301),
    ("5", "any", "5, 6"),
    ("5", "any", "5 \\text{ or } 6"),
    ("\\{1, 2\\}", "set", "1, 2, 3, 4"),
    ("\\{1, 2\\}", "set", "\\{x : x^2 - 3x + 2 = 0\\}"),
    ("x^{2} + 2x + 1", "expanded", "(x+1)^2"),
    ("x^{2} + 2x + 1", "expanded", "(x+1)(x+1)"),
    ("x^{2} + 2x + 1", "expanded", "y = x^2+2x+1"),
]


def row(expected: str, form: str = "any") -> Row:
    return build_row("math_symbolic", "?", expected_answer=expected, answer_form=form)


@pytest.fixture(scope="module")
def environment() -> MathSymbolic:
    return MathSymbolic()


@pytest.mark.parametrize(("expected", "form", "content"), RIGHT)
def test_what_is_equal_earns_one(expected: str, form: str, content: str, environment: MathSymbolic):
    assert judge(environment, row(expected, form), f"So \\boxed{{{content}}}.") == 1


@pytest.mark.parametrize(("expected", "form", "content"), [*WRONG, *HACKS])
def test_anything_else_earns_nothing(
    expected: str, form: str, content: str, environment: MathSymbolic
):
    assert judge(environment, row(expected, form), f"So \\boxed{{{content}}}.") == 0


def test_the_tables_are_long_enough():
    assert_enough(RIGHT, WRONG, HACKS)


def test_the_last_box_counts(environment: MathSymbolic):
    assert judge(environment, row("5"), "\\boxed{5} \\boxed{6}") == 0
    assert judge(environment, row("5"), "\\boxed{6} \\boxed{5}") == 1
    assert judge(environment, row("5"), "\\boxed{5} \\boxed{") == 0
    assert judge(environment, row("5"), "5") == 0


def test_rows_are_good(environment: MathSymbolic):
    assert_good_rows(environment)
    assert rows_elsewhere(["math_symbolic"]) == rows_here(["math_symbolic"])


def test_the_answer_of_every_generated_row_earns_the_reward(environment: MathSymbolic):
    for level in range(4):
        for each in environment.rows(10, 3, level):
            assert judge(environment, each, f"\\boxed{{{each['expected_answer']}}}") == 1


def test_an_endless_computation_is_killed_in_the_pool():
    tower = Response("\\boxed{9^{9^{9^{9}}}}")
    with Verifiers(1) as verifiers:
        # the import of the library takes a few seconds on a busy machine
        [first] = verifiers.verify([row("5")], [Response("\\boxed{5}")], [None], 60)
        assert first.reward == 1
        [verdict] = verifiers.verify([row("5")], [tower], [None], 2)
        assert verdict.mask
        assert "took longer than 2 s" in str(verdict.error)


def test_a_row_that_cannot_be_judged_is_refused(environment: MathSymbolic):
    for changes, said in (
        ({"expected_answer": ""}, "expected_answer = ''"),
        ({"answer_form": "nice"}, "answer_form = 'nice'"),
    ):
        with pytest.raises(BadRow, match=said):
            environment.check({**row("5"), **changes})
