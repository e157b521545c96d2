"""`long_context`: find what a long text hides; the length is counted in tokens."""

import random
import re
from collections.abc import Callable, Iterator
from typing import Any

from nemotron.data.tokenizer import load_tokenizer
from nemotron.errors import UserError
from nemotron.posttrain.environments.answer import BOX, last_boxed
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
from nemotron.posttrain.environments.long_tasks import TASKS, LongTask

SHORTEST = 256
"""Tokens of a prompt at level 0; every level doubles them."""
LONGEST = 2**20
MATCHES = ("all", "any", "fraction")
MAX_ANSWER = 2_000
"""Characters of the longest answer that is read."""


class LongContext(WithoutTools):
    """Answer with the strings that a long text hides, and with none of those beside them.

    The answer is what stands in the last `\\boxed{}`, else the whole text. `match`: all strings of
    `expected`, any of them, or their share. An answer that contains one of `distractors` earns
    nothing, so that repeating the text does not pay. Prompts of level 0 have at most 256 tokens,
    and every further level twice as many.
    """

    name = "long_context"

    def __init__(self, tokenizer: str = "embedded") -> None:
        """`tokenizer` counts the length: `embedded`, or the path of a `tokenizer.json`."""
        if not isinstance(tokenizer, str):
            rule, where = "is not a path; give one, or embedded.", f"environments: {self.name}"
            raise UserError(rule, key="tokenizer", value=tokenizer, where=where)
        self._tokenizer = tokenizer

    def rows(self, count: int, seed: int, level: float) -> Iterator[Row]:
        """Yield tasks; each depends on `seed`, `level`, its number and the tokenizer alone."""
        encode = load_tokenizer(self._tokenizer, "environments.tokenizer").encode
        for number in range(count):
            rng = random_of(self.name, seed, level, number)
            task = TASKS[number % len(TASKS)](rng, whole_level(rng, level))
            tokens = min(int(SHORTEST * 2**level), LONGEST)
            yield build_row(
                self.name,
                fill(rng, task, tokens, lambda text: len(encode(text))),
                kind=task.kind,
                expected=task.expected,
                distractors=task.distractors,
                match="all",
            )

    def check(self, row: Row) -> None:
        """Check what is expected.

        Raises:
            BadRow: when a list is absent or malformed, or a string both expected and not.
        """
        expected, others = find_field(row, "expected"), optional_field(row, "distractors", [])
        for name, value in (("expected", expected), ("distractors", others)):
            if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
                raise BadRow(f"{name} = {value!r} is not a list of texts; give one")
        if not expected:
            raise BadRow("expected is empty; give at least one text")
        if both := {text.lower() for text in expected} & {text.lower() for text in others}:
            raise BadRow(f"{min(both)!r} is in expected and in distractors; remove one")
        match = optional_field(row, "match", "all")
        if match not in MATCHES:
            raise BadRow(f"match = {match!r} is unknown; give one of {', '.join(MATCHES)}")

    def verify(self, row: Row, response: Response, state: Any) -> Verdict:
        """Reward the strings found, if the answer is short and names nothing wrong."""
        text = response.text
        answer = last_boxed(text) if BOX in text else text
        if answer is None or len(answer) > MAX_ANSWER:
            return Verdict(0.0)
        if any(_contains(answer, other) for other in optional_field(row, "distractors", [])):
            return Verdict(0.0, extracted=answer)
        found = [_contains(answer, expected) for expected in find_field(row, "expected")]
        share = sum(found) / len(found)
        match = optional_field(row, "match", "all")
        reward = {"all": float(share == 1), "any": float(share > 0), "fraction": share}[match]
        return Verdict(reward, extracted=answer)


def fill(rng: random.Random, task: LongTask, tokens: int, measure: Callable[[str], int]) -> str:
    """Return the longest prompt with the task that has at most `tokens` tokens.

    A prompt that is longer without any filling is returned as it is.
    """
    seed = rng.random()
    low, high = 1, 2
    while measure(_write(random.Random(seed), task, high)) <= tokens:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        fits = measure(_write(random.Random(seed), task, middle)) <= tokens
        low, high = (middle, high) if fits else (low, middle)
    return _write(random.Random(seed), task, low)


def _write(rng: random.Random, task: LongTask, amount: int) -> str:
    """Return the prompt with `amount` filling sentences, or repetitions of the words."""
    if task.words:
        words = [word for word, often in task.words.items() for _ in range(often * amount)]
        rng.shuffle(words)
        body = " ".join(words)
    else:
        sentences = [task.filler[place % len(task.filler)] for place in range(amount)]
        places = sorted(rng.randint(0, amount) for _ in task.hidden)
        for offset, (place, text) in enumerate(zip(places, task.hidden, strict=True)):
            sentences.insert(place + offset, text)
        body = " ".join(sentences)
    end = "Give the answer in \\boxed{}, and in it nothing else of the text."
    return f"Read this text.\n\n{body}\n\n{task.question} {end}"


def _contains(answer: str, wanted: str) -> bool:
    """Whether a text contains another between boundaries of words, in any case of letters."""
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", answer, re.IGNORECASE) is not None
