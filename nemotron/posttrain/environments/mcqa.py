"""`mcqa`: questions with lettered options, of which one is right."""

import random
import re
import string
from collections.abc import Iterator
from typing import Any

from nemotron.posttrain.environments.answer import last_boxed, without_text
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
from nemotron.posttrain.environments.facts import RELATIONS, Relation

MODES = ("strict_single_letter_boxed", "lenient_boxed", "lenient_answer_colon")
AROUND = " \t\n().:$*"
"""What may surround the text of an option."""
LETTER = re.compile(r"[^A-Za-z]*([A-Z])[^A-Za-z]*|\s*([A-Z])\s*[:).\-].*", re.DOTALL)
"""A letter by itself, or as the label of whatever follows; as in NVIDIA-NeMo/Gym 0.7.0."""


class MultipleChoice(WithoutTools):
    """Choose the letter of the right option; one in the last `\\boxed{}` counts.

    Level 0 offers two options, every further level two more, up to ten. `grading_mode` as in
    NVIDIA-NeMo/Gym: `lenient_boxed` takes the text of an option in the box as well, and
    `lenient_answer_colon` reads what follows the last "Answer:".
    """

    name = "mcqa"
    max_level = 4
    """Offers ten options."""

    def rows(self, count: int, seed: int, level: float) -> Iterator[Row]:
        """Yield tasks; each depends on `seed`, `level` and its number alone."""
        for number in range(count):
            rng = random_of(self.name, seed, level, number)
            size = min(2 + 2 * whole_level(rng, level), 10)
            yield _build(self.name, rng, rng.choice(RELATIONS), size)

    def check(self, row: Row) -> None:
        """Check the options, the expected letter and the mode.

        Raises:
            BadRow: when one is absent or does not fit.
        """
        letters = options_of(row)
        expected = str(find_field(row, "expected_answer")).strip().upper()
        if expected not in letters:
            raise BadRow(
                f"expected_answer = {expected!r} is not the letter of an option; "
                f"give one of {', '.join(letters)}"
            )
        mode = optional_field(row, "grading_mode", MODES[0])
        if mode not in MODES:
            raise BadRow(f"grading_mode = {mode!r} is unknown; give one of {', '.join(MODES)}")

    def demonstrate(self, row: Row) -> Response:
        """Return the letter in a box; the reasoning is the text of its option."""
        letter = str(find_field(row, "expected_answer")).strip().upper()
        return Response(f"\\boxed{{{letter}}}", options_of(row)[letter])

    def verify(self, row: Row, response: Response, state: Any) -> Verdict:
        """Reward 1 if the letter found is the expected one, else 0."""
        letter = extract(row, response.text)
        expected = str(find_field(row, "expected_answer")).strip().upper()
        return Verdict(float(letter == expected), extracted=letter)


def options_of(row: Row) -> dict[str, str]:
    """Return the text of each option by its letter.

    Raises:
        BadRow: when the options are not a list of one letter and one text each.
    """
    options = find_field(row, "options")
    found: dict[str, str] = {}
    for entry in options if isinstance(options, list) else [None]:
        pair = list(entry.items()) if isinstance(entry, dict) else []
        letter = str(pair[0][0]).upper() if len(pair) == 1 else ""
        if letter not in string.ascii_uppercase or len(letter) != 1 or letter in found:
            raise BadRow(
                f"options contains {entry!r}; give a list of one letter with its text each, "
                'such as [{"A": "Oslo"}, {"B": "Bern"}]'
            )
        found[letter] = str(pair[0][1])
    return found


def extract(row: Row, text: str) -> str | None:
    """Return the letter that an answer chooses, None if there is not exactly one."""
    options = options_of(row)
    mode = optional_field(row, "grading_mode", MODES[0])
    if mode == "lenient_answer_colon":
        lines = re.findall(r"(?i)answer[ \t]*:(.*)", text)
        return _choose(lines[-1], options, by_text=True) if lines else None
    content = last_boxed(text)
    return None if content is None else _choose(content, options, mode == "lenient_boxed")


def _choose(content: str, options: dict[str, str], by_text: bool) -> str | None:
    """Return the option that `content` names by its letter, or by its whole text."""
    inner = without_text(content.strip(AROUND)).strip(AROUND)
    if found := LETTER.fullmatch(without_text(content.strip())):
        letter = found[1] or found[2]
        if letter in options:
            return letter
    if not by_text:
        return None
    if inner.upper() in options:
        return inner.upper()
    texts = [letter for letter, text in options.items() if _plain(text) == _plain(inner)]
    return texts[0] if len(texts) == 1 else None


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _build(name: str, rng: random.Random, relation: Relation, size: int) -> Row:
    """Return a question about one pair of a table, with other pairs as distractors."""
    pairs = rng.sample(relation.pairs, size)
    subject, right = pairs[0]
    choices = [value for _, value in pairs]
    rng.shuffle(choices)
    letters = string.ascii_uppercase[:size]
    question = relation.question.format(subject)
    lines = [question, *(f"{a}. {b}" for a, b in zip(letters, choices, strict=True))]
    prompt = "\n".join([*lines, "Give the letter of the right option in \\boxed{}."])
    options = [{letter: text} for letter, text in zip(letters, choices, strict=True)]
    answer = letters[choices.index(right)]
    return build_row(name, prompt, question=question, options=options, expected_answer=answer)
