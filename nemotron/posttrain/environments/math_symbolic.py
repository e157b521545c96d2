"""`math_symbolic`: problems whose answers are compared as mathematics, by `math-verify`."""

import logging
import re
from collections.abc import Iterator
from typing import Any

from nemotron.errors import UserError
from nemotron.posttrain.environments.answer import last_boxed
from nemotron.posttrain.environments.base import (
    BadRow,
    Response,
    Row,
    Verdict,
    WithoutTools,
    build_row,
    find_field,
    optional_field,
    random_of,
    whole_level,
)
from nemotron.posttrain.environments.math_tasks import MAKERS, make_task

MAX_LENGTH = 300
"""Characters of the longest answer."""
NUMBER = r"[-+]?\s*(?:\d+(?:\.\d+)?(?:\s*/\s*\d+)?|\\[dt]?frac\s*(?:\{\d+\}\s*\{\d+\}|\d\s*\d))"
FORMS = {
    "any": re.compile(r".*", re.DOTALL),
    "number": re.compile(rf"\s*(?:[a-z]\s*=)?\s*{NUMBER}\s*"),
    "set": re.compile(rf"\s*(?:\\\{{)?\s*{NUMBER}(?:\s*,\s*{NUMBER})*\s*(?:\\\}})?\s*"),
    "expanded": re.compile(r"[^()=]*"),
}
"""How an answer may be written, so that a problem written down again is not its answer."""


class MathSymbolic(WithoutTools):
    """Solve a problem; what stands in the last `\\boxed{}` has to equal `expected_answer`.

    Equal is what `math-verify` finds to be equal: 1/2 and 0.5, sets in any order, expressions.
    `answer_form` restricts how the answer may be written: a number, a set (of numbers, also without
    braces), an expanded expression (without brackets), or any. `math-verify` may compute without
    end, so verify in a pool of processes (`nemotron.posttrain.verify`).

    Raises:
        UserError: when the package `math-verify` is not installed.
    """

    name = "math_symbolic"
    max_level = len(MAKERS) - 1

    def __init__(self) -> None:
        try:
            import math_verify
        except ImportError:
            raise UserError(
                "needs the package math-verify; install it with: pip install 'math-verify>=0.9'",
                key="environments",
                value="math_symbolic",
            ) from None
        # says at each call that its own limit of time is off; ours is the pool's
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        self._library = math_verify

    def rows(self, count: int, seed: int, level: float) -> Iterator[Row]:
        """Yield tasks; each depends on `seed`, `level` and its number alone."""
        for number in range(count):
            rng = random_of(self.name, seed, level, number)
            task = make_task(rng, whole_level(rng, level))
            yield build_row(
                self.name,
                f"{task.question} Give the answer in \\boxed{{}}.",
                question=task.question,
                expected_answer=task.answer,
                answer_form=task.form,
            )

    def check(self, row: Row) -> None:
        """Check the expected answer.

        Raises:
            BadRow: when it is absent or cannot be read as mathematics.
        """
        expected = str(find_field(row, "expected_answer"))
        if not expected.strip() or not self._parse(expected):
            raise BadRow(f"expected_answer = {expected!r} cannot be read; give LaTeX")
        form = optional_field(row, "answer_form", "any")
        if form not in FORMS:
            raise BadRow(f"answer_form = {form!r} is unknown; give one of {', '.join(FORMS)}")

    def verify(self, row: Row, response: Response, state: Any) -> Verdict:
        """Reward 1 if the answer equals the expected one, else 0."""
        answer = last_boxed(response.text)
        if answer is None or not answer.strip() or len(answer) > MAX_LENGTH:
            return Verdict(0.0)
        form = FORMS[optional_field(row, "answer_form", "any")]
        if form.fullmatch(answer.replace("\\left", "").replace("\\right", "")) is None:
            return Verdict(0.0, extracted=answer)
        expected = self._parse(str(find_field(row, "expected_answer")))
        is_equal = self._library.verify(expected, self._parse(answer), timeout_seconds=None)
        return Verdict(float(is_equal), extracted=answer)

    def _parse(self, text: str) -> list[Any]:
        found = self._library.parse(
            f"${text.strip().strip('$')}$",
            extraction_config=[self._library.LatexExtractionConfig()],
            parsing_timeout=None,
        )
        return list(found)
