"""Random small functions to write, described in words, with inputs and outputs of each."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Numbers = list[int]
Step = tuple[str, Callable[[Numbers], Numbers]]
End = tuple[str, Callable[[Numbers], int]]


@dataclass(frozen=True)
class CodeTask:
    """A description of a function of a list of whole numbers, and what it returns."""

    text: str
    inputs: list[list[Any]]
    """Arguments of each call."""
    outputs: list[Any]


def make_task(rng: random.Random, level: int, count: int) -> CodeTask:
    """Return a function of `level` steps and an end, with `count` calls of it."""
    steps = [rng.choice(STEPS)(rng) for _ in range(level)]
    end, reduce = rng.choice(ENDS)
    inputs: list[Numbers] = [[]]
    while len(inputs) < count:
        inputs.append([rng.randint(-20, 50) for _ in range(rng.randint(1, 8))])
    outputs = []
    for numbers in inputs:
        values = list(numbers)
        for _, apply in steps:
            values = apply(values)
        outputs.append(reduce(values))
    said = [text for text, _ in steps]
    text = f"{'; then '.join([*said, ''])}return {end} (0 if the list is empty)."
    return CodeTask(text, [[numbers] for numbers in inputs], outputs)


def _keep(rng: random.Random) -> Step:
    number = rng.randint(2, 5)
    return (
        f"keep only the multiples of {number}",
        lambda values: [value for value in values if value % number == 0],
    )


def _above(rng: random.Random) -> Step:
    number = rng.randint(-5, 15)
    return (
        f"keep only the numbers greater than {number}",
        lambda values: [value for value in values if value > number],
    )


def _scale(rng: random.Random) -> Step:
    factor, offset = rng.randint(2, 9), rng.randint(1, 9)
    return (
        f"multiply each number by {factor} and add {offset}",
        lambda values: [value * factor + offset for value in values],
    )


def _differences(rng: random.Random) -> Step:
    return (
        "replace the list by the differences of each number and the one before it",
        lambda values: [b - a for a, b in pairwise(values)],
    )


def _sums(rng: random.Random) -> Step:
    def apply(values: Numbers) -> Numbers:
        found, total = [], 0
        for value in values:
            total += value
            found.append(total)
        return found

    return "replace each number by the sum of all numbers up to it", apply


def _unique(rng: random.Random) -> Step:
    return "remove repetitions, of which the first stays", lambda v: list(dict.fromkeys(v))


def _every_second(rng: random.Random) -> Step:
    return "keep the first number, the third, and so on", lambda values: values[::2]


STEPS = (_keep, _above, _scale, _differences, _sums, _unique, _every_second)
ENDS: tuple[End, ...] = (
    ("the sum", sum),
    ("the largest number", lambda values: max(values, default=0)),
    ("the smallest number", lambda values: min(values, default=0)),
    ("how many numbers there are", len),
    ("the last number", lambda values: values[-1] if values else 0),
    ("the sum of the squares", lambda values: sum(value * value for value in values)),
    ("the largest minus the smallest", lambda values: max(values) - min(values) if values else 0),
)
