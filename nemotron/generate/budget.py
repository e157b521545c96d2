"""A limit on reasoning: at the budget, the closing tag is put where the model did not write it."""

import functools
from dataclasses import dataclass

from nemotron.data.tokenizer import Tokenizer
from nemotron.errors import UserError


@dataclass(frozen=True)
class ReasoningBudget:
    """Tokens that an answer may reason before it must close the tag.

    From `tokens` on, reasoning is closed at the next end of a line; after `grace` further tokens it
    is closed wherever it is. A tag that the model has half written is completed. Reasoning begins
    with the answer.
    Source: NVIDIA-NeMo/Nemotron: tools/budget (the budget logits processor).
    """

    tokens: int
    grace: int
    end: tuple[int, ...]
    """Tokens of the closing tag."""
    line_ends: frozenset[int] = frozenset()
    """Tokens whose text ends a line."""

    def __post_init__(self) -> None:
        for name in ("tokens", "grace"):
            if (value := getattr(self, name)) < 0:
                raise UserError("must be at least 0.", key=name, value=value, where="budget")
        if not self.end:
            raise UserError("the closing tag has no token; give it at least one.", where="budget")

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, tokens: int, grace: int = 0, tag: str = "</think>"
    ) -> "ReasoningBudget":
        """Return the budget with the tokens that `tokenizer` has for the tag and for line ends."""
        return cls(
            tokens, grace, tuple(tokenizer.encode(tag, specials=True)), find_line_ends(tokenizer)
        )


@functools.lru_cache(maxsize=4)
def find_line_ends(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens whose text ends with a line break."""
    ids = range(tokenizer.vocab_size)
    return frozenset(token for token in ids if tokenizer.decode([token]).endswith("\n"))


class Reasoning:
    """Watches one answer, token by token."""

    def __init__(self, budget: ReasoningBudget) -> None:
        self._budget = budget
        self._seen: list[int] = []
        self._is_closed = False

    def begin(self) -> tuple[int, ...]:
        """Return the tokens that the answer must begin with."""
        return self._close() if self._budget.tokens + self._budget.grace == 0 else ()

    def push(self, token: int) -> tuple[int, ...]:
        """Return the tokens that must follow `token`; mostly none."""
        if self._is_closed:
            return ()
        self._seen.append(token)
        budget, count = self._budget, len(self._seen)
        if tuple(self._seen[-len(budget.end) :]) == budget.end:
            self._is_closed = True
            return ()
        is_late = count >= budget.tokens + budget.grace
        if is_late or (count >= budget.tokens and token in budget.line_ends):
            return self._close()
        return ()

    def _close(self) -> tuple[int, ...]:
        self._is_closed = True
        end = self._budget.end
        written = next(
            length
            for length in range(len(end) - 1, -1, -1)
            if tuple(self._seen[len(self._seen) - length :]) == end[:length]
        )
        return end[written:]
