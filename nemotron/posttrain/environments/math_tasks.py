"""Random problems of algebra and number theory with their answers in LaTeX."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class MathTask:
    """A problem, its answer, and the form in which the answer has to be written."""

    question: str
    answer: str
    form: str
    """number, set or expanded, as `math_symbolic` checks them."""


def make_task(rng: random.Random, level: int) -> MathTask:
    """Return a problem of a level from 0 to 3."""
    return rng.choice(MAKERS[min(level, len(MAKERS) - 1)])(rng, level)


def _linear(rng: random.Random, level: int) -> MathTask:
    a, b, c = rng.randint(2, 9), rng.randint(-20, 20), rng.randint(-30, 30)
    question = f"Solve ${a}x {_signed(b)} = {c}$ for $x$."
    return MathTask(question, _fraction(Fraction(c - b, a)), "number")


def _divisor(rng: random.Random, level: int) -> MathTask:
    factor = rng.randint(2, 20)
    a, b = factor * rng.randint(2, 30), factor * rng.randint(2, 30)
    if rng.random() < 0.5:
        answer, name = math.gcd(a, b), "greatest common divisor"
    else:
        answer, name = math.lcm(a, b), "least common multiple"
    return MathTask(f"What is the {name} of {a} and {b}?", str(answer), "number")


def _expand(rng: random.Random, level: int) -> MathTask:
    a, b = rng.randint(1, 9), rng.randint(-9, -1)
    first, second = rng.randint(1, 4), rng.randint(1, 4)
    question = f"Expand $({first}x {_signed(a)})({second}x {_signed(b)})$."
    answer = _polynomial([first * second, first * b + second * a, a * b])
    return MathTask(question, answer, "expanded")


def _roots(rng: random.Random, level: int) -> MathTask:
    a, b = rng.sample(range(-12, 13), 2)
    question = f"Find all solutions of ${_polynomial([1, -a - b, a * b])} = 0$."
    return MathTask(question, f"\\{{{a}, {b}\\}}", "set")


def _remainder(rng: random.Random, level: int) -> MathTask:
    base, power, modulus = rng.randint(2, 30), rng.randint(10, 200), rng.randint(7, 99)
    question = f"What is the remainder of ${base}^{{{power}}}$ divided by {modulus}?"
    return MathTask(question, str(pow(base, power, modulus)), "number")


def _series(rng: random.Random, level: int) -> MathTask:
    first, step, count = rng.randint(1, 30), rng.randint(2, 12), rng.randint(10, 60)
    question = (
        f"An arithmetic sequence begins with {first} and has the difference {step}. "
        f"What is the sum of its first {count} terms?"
    )
    return MathTask(question, str(count * (2 * first + (count - 1) * step) // 2), "number")


def _derivative(rng: random.Random, level: int) -> MathTask:
    terms = [rng.randint(1, 9), *(rng.randint(-9, 9) for _ in range(level))]
    degree = len(terms) - 1
    derived = [value * (degree - place) for place, value in enumerate(terms[:-1])]
    question = f"Give the derivative of ${_polynomial(terms)}$ with respect to $x$."
    return MathTask(question, _polynomial(derived), "expanded")


def _system(rng: random.Random, level: int) -> MathTask:
    x, y = rng.randint(-15, 15), rng.randint(-15, 15)
    a, b, c, d = (rng.randint(1, 9) for _ in range(4))
    d += a * d == b * c  # then the two equations differ
    question = (
        f"Let ${a}x + {b}y = {a * x + b * y}$ and ${c}x + {d}y = {c * x + d * y}$. What is $x - y$?"
    )
    return MathTask(question, str(x - y), "number")


def _signed(value: int) -> str:
    return f"+ {value}" if value >= 0 else f"- {-value}"


def _fraction(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    sign = "-" if value < 0 else ""
    return f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def _polynomial(coefficients: list[int]) -> str:
    """Return a polynomial in x, from the highest power."""
    text = ""
    for place, value in enumerate(coefficients):
        power = len(coefficients) - 1 - place
        if value == 0:
            continue
        letter = {0: "", 1: "x"}.get(power, f"x^{{{power}}}")
        size = "" if abs(value) == 1 and power else str(abs(value))
        sign = ("-" if value < 0 else "") if not text else (" - " if value < 0 else " + ")
        text += f"{sign}{size}{letter}"
    return text or "0"


MAKERS: tuple[tuple[Callable[[random.Random, int], MathTask], ...], ...] = (
    (_linear, _divisor),
    (_expand, _roots),
    (_remainder, _series),
    (_derivative, _system),
)
