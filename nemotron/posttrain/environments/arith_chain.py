"""`arith_chain`: short chains of sums, differences and products, with an exact answer."""

import operator
import random
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from nemotron.errors import UserError
from nemotron.posttrain.environments import desk
from nemotron.posttrain.environments.answer import BOX, last_boxed
from nemotron.posttrain.environments.base import (
    BadRow,
    Response,
    Row,
    Verdict,
    build_row,
    demonstrated_call,
    find_field,
    random_of,
    whole_level,
)

NUMBER = re.compile(r"[-+]?\d+(?:/[1-9]\d*)?")
"""An integer or a fraction, without spaces."""
TOOL = next(tool for tool in desk.specifications() if tool["name"] == "calculate")
"""The calculator."""
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
WORDY = 0.9
"""Share of mistakes that have the right value, in a form that is not read as a number."""
WORDS = ("about {}", "it is {}", "{} or so", "{}?")
ERRORS = (-3, -2, -1, 1, 2, 3)
"""By how much the other mistakes are wrong."""
MAX_LENGTH = 64
"""Characters of the longest answer that is read as a number."""


class ArithChain:
    """Compute a chain of additions, subtractions and, at higher levels, multiplications.

    Level 0 adds or subtracts two digits; every further level adds a term, larger numbers and,
    from level 1, products. The answer is the whole text, or what stands in its last `\\boxed{}`.
    With the option `tools` there is a calculator, which nobody has to use.

    Raises:
        UserError: when `tools` is not true or false.
    """

    name = "arith_chain"
    max_level = 100
    """Of 102 terms; more would only make long texts."""

    def __init__(self, tools: bool = False) -> None:
        if not isinstance(tools, bool):
            where = f"environments: {self.name}"
            raise UserError("must be true or false.", key="tools", value=tools, where=where)
        self._tools = [TOOL] if tools else []

    def rows(self, count: int, seed: int, level: float) -> Iterator[Row]:
        """Yield tasks; each depends on `seed`, `level` and its number alone."""
        for number in range(count):
            rng = random_of(self.name, seed, level, number)
            question, value = _chain(rng, level)
            row = build_row(self.name, f"{question}=", question=question, expected_answer=value)
            if self._tools:
                row["responses_create_params"]["tools"] = self.tools(row)
            yield row

    def check(self, row: Row) -> None:
        """Check the expected answer.

        Raises:
            BadRow: when it is absent, or neither an integer nor a fraction.
        """
        expected = find_field(row, "expected_answer")
        if _number(str(expected)) is None:
            raise BadRow(
                f"expected_answer = {expected!r} is not a number; "
                "give an integer or a fraction such as 3/4"
            )

    def tools(self, row: Row) -> list[dict[str, Any]]:
        """Return the calculator, if the rows offer it."""
        return [dict(tool) for tool in self._tools]

    def seed(self, row: Row) -> dict[str, Any] | None:
        """Return the calculator's state, which is empty; None without one."""
        return {} if self._tools else None

    def call(self, state: Any, name: str, arguments: Any) -> str:
        """Compute an expression."""
        if not self._tools or name != TOOL["name"]:
            return f"error: there is no tool {name}"
        return desk.run_tool({}, name, arguments)

    def demonstrate(self, row: Row) -> Response:
        """Return the value; the reasoning computes it in steps, products first, or a call does.

        With a call the reasoning before it is the question, and that after it what the tool said.
        """
        question, value = str(find_field(row, "question")), str(find_field(row, "expected_answer"))
        if self._tools:
            call = demonstrated_call("calculate", {"expression": question}, value)
            thought = {"type": "reasoning", "summary": [], "text": question}
            return Response(value, value, output=(thought, *call))
        return Response(value, "\n".join(_steps(question)))

    def mistake(self, row: Row, rng: random.Random) -> Response:
        """Return what earns nothing: mostly the value in words around it, else a wrong one."""
        right = self.demonstrate(row)
        if rng.random() < WORDY:
            return Response(rng.choice(WORDS).format(right.text), right.reasoning)
        wrong = str(int(right.text) + rng.choice(ERRORS))
        steps, _, _ = right.reasoning.rpartition("=")
        return Response(wrong, f"{steps}={wrong}" if steps else "")

    def verify(self, row: Row, response: Response, state: Any) -> Verdict:
        """Reward 1 if the answer equals the expected one as a number, else 0."""
        expected = _number(str(find_field(row, "expected_answer")))
        extracted = extract(response.text)
        found = None if extracted is None else _number(extracted)
        is_right = found is not None and found == expected
        return Verdict(float(is_right), extracted=extracted)


def extract(text: str) -> str | None:
    """Return the content of the last `\\boxed{}`, else the whole text; None if that is long."""
    found = last_boxed(text) if BOX in text else text
    found = (found or "").strip()
    return found if found and len(found) <= MAX_LENGTH else None


def _number(text: str) -> Fraction | None:
    text = text.strip()
    if len(text) > MAX_LENGTH or NUMBER.fullmatch(text) is None or not text.isascii():
        return None
    return Fraction(text)


def _steps(question: str) -> list[str]:
    """Return the computation of each operator of a chain, in their order."""
    terms = re.findall(r"\d+|[-+*]", question)
    steps = []
    for kind in ("*", "+-"):
        place = 1
        while place < len(terms):
            if terms[place] not in kind:
                place += 2
                continue
            first, sign, second = terms[place - 1 : place + 2]
            value = OPERATORS[sign](int(first), int(second))
            steps.append(f"{first}{sign}{second}={value}")
            terms[place - 1 : place + 2] = [str(value)]
    return steps


def _chain(rng: random.Random, level: float) -> tuple[str, str]:
    """Return a chain and its value."""
    whole = whole_level(rng, level)
    largest = 9 if whole < 2 else 10 ** min(whole, 6) - 1
    operators = "+-" if whole < 1 else "+-*"
    numbers = [rng.randint(0, largest) for _ in range(2 + whole)]
    text, value = str(numbers[0]), [numbers[0]]
    for number in numbers[1:]:
        sign = rng.choice(operators)
        text += f"{sign}{number}"
        if sign == "*":
            value[-1] *= number  # before the sums, as everywhere
        else:
            value.append(number if sign == "+" else -number)
    return text, str(sum(value))
