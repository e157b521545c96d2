"""`long_context`: find what a long text hides; the length is counted in tokens."""

import random
import re
from collections.abc import Callable, Iterator, Sequence
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
from nemotron.posttrain.environments.long_tasks import KINDS, NEEDLES, LongTask

SHORTEST = 256
"""Tokens of a prompt at level 0; every level doubles them."""
LONGEST = 2**20
MATCHES = ("all", "any", "fraction")
PADDING = " a"
"""Fills a prompt up to its exact length; `ENDS` what it cannot reach."""
ENDS = (",", " -", ",", "!", "a")
MAX_ANSWER = 2_000
"""Characters of the longest answer that is read."""


class LongContext(WithoutTools):
    """Answer with the strings that a long text hides, and with none of those beside them.

    The answer is what stands in the last `\\boxed{}`, else the whole text. `match`: all strings of
    `expected`, any of them, or their share. An answer that contains one of `distractors` earns
    nothing, so that repeating the text does not pay. Prompts of level 0 have 256 tokens, and every
    further level twice as many.
    """

    name = "long_context"
    max_level = (LONGEST // SHORTEST).bit_length() - 1
    """Has prompts of the longest kind."""

    def __init__(
        self,
        tokenizer: str = "embedded",
        kinds: Sequence[str] = tuple(KINDS),
        tokens: int | None = None,
        depth: float | None = None,
    ) -> None:
        """`tokenizer` counts the length: `embedded`, or the path of a `tokenizer.json`.

        `kinds` come in turn. `tokens` is the length of each prompt, in place of that of its level.
        `depth` puts needles that the answer needs at this share of the text, from 0 to 1; absent:
        anywhere.
        """
        self._tokenizer, self._tokens, self._depth = tokenizer, tokens, depth
        self._kinds = tuple(kinds) if isinstance(kinds, Sequence) else ()
        if not isinstance(tokenizer, str):
            raise self._wrong("tokenizer", tokenizer, "is not a path; give one, or embedded.")
        if isinstance(kinds, str) or not self._kinds or any(k not in KINDS for k in self._kinds):
            raise self._wrong("kinds", kinds, f"is not a list of {', '.join(KINDS)}.")
        if tokens is not None and not (_is_number(tokens) and 64 <= tokens <= LONGEST):
            raise self._wrong("tokens", tokens, f"is not a number from 64 to {LONGEST}.")
        if depth is not None and not (_is_number(depth) and 0 <= depth <= 1):
            raise self._wrong("depth", depth, "is not a share from 0 to 1.")
        if depth is not None and (others := [k for k in self._kinds if k not in NEEDLES]):
            rule = f"has no meaning for {others[0]}; leave it out, or ask for needles alone."
            raise self._wrong("depth", depth, rule)

    def _wrong(self, key: str, value: object, rule: str) -> UserError:
        return UserError(rule, key=key, value=value, where=f"environments: {self.name}")

    def rows(self, count: int, seed: int, level: float) -> Iterator[Row]:
        """Yield tasks; each depends on `seed`, `level`, its number and the options alone.

        A prompt has exactly as many tokens as wanted wherever the tokenizer allows it, else up to
        two less; one that is longer without any filling stays so.
        """
        encode = load_tokenizer(self._tokenizer, "environments.tokenizer").encode
        for number in range(count):
            rng = random_of(self.name, seed, level, number)
            make = KINDS[self._kinds[number % len(self._kinds)]]
            task = make(rng, whole_level(rng, level))
            tokens = self._tokens or min(int(SHORTEST * 2**level), LONGEST)
            yield build_row(
                self.name,
                fill(rng, task, tokens, lambda text: len(encode(text)), self._depth),
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


def fill(
    rng: random.Random,
    task: LongTask,
    tokens: int,
    measure: Callable[[str], int],
    depth: float | None = None,
) -> str:
    """Return a prompt with the task that has `tokens` tokens, or as many as can be made.

    A prompt that is longer without any filling is returned as it is.
    """
    seed = rng.random()

    def write(amount: int, rest: str = "") -> str:
        return _write(random.Random(seed), task, amount, depth, rest)

    low, high = task.least, 2 * task.least
    while measure(write(high)) <= tokens:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if measure(write(middle)) <= tokens else (low, middle)
    rest = ""
    for size in _halves(tokens - measure(write(low))):
        while measure(write(low, longer := rest + PADDING * size)) <= tokens:
            rest = longer
    for last in ENDS:
        if measure(write(low, rest)) < tokens and measure(write(low, rest + last)) <= tokens:
            rest += last
    return write(low, rest)


def _halves(size: int) -> Iterator[int]:
    """Yield powers of two downwards, from at most `size`."""
    for place in reversed(range(max(size, 0).bit_length())):
        yield 2**place


def _write(rng: random.Random, task: LongTask, amount: int, depth: float | None, rest: str) -> str:
    """Return the prompt with `amount` filling sentences, or repetitions of the words."""
    if task.words:
        words = [word for word, often in task.words.items() for _ in range(int(often * amount))]
        rng.shuffle(words)
        body = " ".join(words)
    else:
        body = _sentences(rng, task, amount, depth)
    end = "Give the answer in \\boxed{}, and in it nothing else of the text."
    return f"Read this text{rest}.\n\n{body}\n\n{task.question} {end}"


def _sentences(rng: random.Random, task: LongTask, amount: int, depth: float | None) -> str:
    """Return filling sentences with the hidden ones among them."""
    sentences = [task.filler[place % len(task.filler)] for place in range(amount)]
    places = {text: rng.randint(0, amount) for text in task.hidden}
    if not task.answering:  # steps of a chain stand in their order
        places = dict(zip(task.hidden, sorted(places.values()), strict=True))
    elif depth is not None:
        places |= dict.fromkeys(task.answering, round(depth * amount))
    ordered = sorted(task.hidden, key=lambda text: places[text])
    for offset, text in enumerate(ordered):
        sentences.insert(places[text] + offset, text)
    if not task.per_document:
        return " ".join(sentences)
    size = task.per_document
    parts = [" ".join(sentences[i : i + size]) for i in range(0, len(sentences), size)]
    return "\n".join(f"Document {number}: {part}" for number, part in enumerate(parts, 1))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _contains(answer: str, wanted: str) -> bool:
    """Whether a text contains another between boundaries of words, in any case of letters."""
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", answer, re.IGNORECASE) is not None
