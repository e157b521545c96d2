"""The calculator against Python's own arithmetic, and everything that is not arithmetic."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron.posttrain.environments.calculator import BadExpression, evaluate, render


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1 + 2 * 3", "7"),
        ("(1 + 2) * 3", "9"),
        ("7 / 2", "3.5"),
        ("-7 // 2", "-4"),
        ("-7 % 3", "2"),
        ("2 ** 10", "1024"),
        ("2 ** -2", "0.25"),
        ("-2 ** 2", "-4"),
        ("0.1 + 0.2", "0.3"),
        ("1 / 3", "0.333333333333"),
        ("-1 / 3", "-0.333333333333"),
        ("abs(-3) + min(1, 2) + max(3, 4)", "8"),
        ("1e3", "1000"),
        (" 5 ", "5"),
        ("0.000000000001 / 2", "0"),
    ],
)
def test_arithmetic(text: str, value: str):
    assert render(evaluate(text)) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1 +",
        "1 / 0",
        "5 % 0",
        "9 ** 9 ** 9",
        "9 ** 99999",
        "2 ** 0.5",
        "1e400",
        "__import__('os')",
        "().__class__",
        "abs",
        "abs()",
        "abs(1, 2)",
        "min(1)",
        "open(1)",
        "1 if 2 else 3",
        "True",
        "'a'",
        "[1, 2]",
        "1, 2",
        "x",
        "lambda: 1",
        "1 < 2",
        "007",
        "1_000",
        "0x10",
        "3j",
        "(" * 200 + "1" + ")" * 99,
        "-" * 299 + "1 1",
        "9" * 301,
        "1\x00",
        "\ud800",
    ],
)
def test_anything_else_is_refused(text: str):
    with pytest.raises(BadExpression):
        evaluate(text)


@given(st.fractions(max_denominator=10**6), st.fractions(max_denominator=10**6))
def test_operations_are_exact(a: Fraction, b: Fraction):
    terms = f"({a.numerator}/{a.denominator})", f"({b.numerator}/{b.denominator})"
    for sign, value in (("+", a + b), ("-", a - b), ("*", a * b)):
        assert evaluate(sign.join(terms)) == value


@given(st.decimals(places=9, min_value=-(10**9), max_value=10**9))
def test_decimals_are_rendered_as_they_are(value: object):
    assert Fraction(render(Fraction(str(value)))) == Fraction(str(value))
