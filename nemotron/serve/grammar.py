"""Answers that are JSON of a given schema, by the package llguidance."""

import functools
import importlib.util
import json
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nemotron.data.tokenizer import Tokenizer
from nemotron.generate.guide import Guide
from nemotron.serve.split import END

INSTALL = "pip install 'nemotron-train[serve]'"
MOST_SCHEMA = 1 << 14
"""Characters of a schema; those of 57,000 take half a second of a core."""
SPACE = r"( |\n[ \t]{0,32})?"
"""What may stand between two parts of JSON: with more, a weak model writes spaces for ever."""
FORM = "start: LINE value\nLINE: /\\n?/\nvalue: %json {}"
"""Grammar of an answer: the chat format has a line end between reasoning and content."""


@dataclass(frozen=True)
class JsonForm:
    """The form of one schema, ready for any number of answers."""

    matcher: Any  # Any: a package without types for mypy, which is optional
    stop_ids: frozenset[int]
    opening: tuple[int, ...] = ()
    """Tokens after which the form begins; empty if it begins at once."""

    def begin(self) -> Guide:
        """Return what follows a new answer."""
        return JsonGuide(self.matcher.deep_copy(), self.stop_ids, self.opening)


class JsonGuide:
    """Follows one answer: free reasoning, which must end, then JSON, then a stop token."""

    def __init__(
        self, matcher: Any, stop_ids: frozenset[int], opening: tuple[int, ...]
    ) -> None:  # Any: as in `JsonForm`
        self._matcher, self._stop_ids = matcher, stop_ids
        self._opening, self._seen = opening, deque[int](maxlen=len(opening))
        self._is_open = not opening

    def restrict(self, logits: Float[Tensor, " V"]) -> None:
        """Set the logits of tokens that may not come next to -inf, in place."""
        if self._is_open:
            logits.masked_fill_(~self._allowed(logits.shape[0]).to(logits.device), -torch.inf)
        else:
            logits[list(self._stop_ids)] = -torch.inf

    def push(self, token: int) -> bool:
        """Take the next token; False when the package gives up, or the token breaks the form."""
        if self._is_open:
            return bool(self._matcher.consume_token(token))
        self._seen.append(token)
        self._is_open = tuple(self._seen) == self._opening
        return True

    def _allowed(self, vocab_size: int) -> Bool[Tensor, " V"]:
        """Return which tokens may come next: those that stop where the package has given up."""
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        places = torch.arange(8, dtype=torch.uint8)
        return (bits[:, None] >> places & 1).flatten()[:vocab_size].bool()


class JsonForms:
    """Makes forms of schemas for one vocabulary; threads may share it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: frozenset[int]) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._stop_ids = stop_ids

    def form(self, schema: dict[str, Any] | bool, *, after_reasoning: bool) -> JsonForm:
        """Return the form of a schema; `Any` is JSON.

        Raises:
            ValueError: when the package is missing, or cannot express the schema.
        """
        import llguidance

        options = {"x-guidance": {"whitespace_pattern": SPACE}}
        text = json.dumps(options | schema if isinstance(schema, dict) else schema)
        if len(text) > MOST_SCHEMA:
            raise ValueError(f"it has {len(text):,} characters, at most {MOST_SCHEMA:,} are taken")
        grammar = FORM.format(text)
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0)
        matcher.compute_bitmask()  # some limits show only here
        if matcher.is_error():
            raise ValueError(_reason(matcher.get_error()))
        opening = self._tokenizer.encode(END, specials=True) if after_reasoning else ()
        return JsonForm(matcher, self._stop_ids, tuple(opening))

    @functools.cached_property
    def _vocabulary(self) -> Any:  # Any: as in `JsonForm`
        import llguidance

        return llguidance.LLTokenizer(
            self._tokenizer.content.decode(), self._vocab_size, sorted(self._stop_ids)
        )


def _reason(error: str) -> str:
    """Return what the package says is wrong, without the lines of the grammar that follow it."""
    text = error.partition("\n   1 |")[0].rpartition("failed to compile JSON schema: ")[2]
    return " ".join(text.split()).rstrip(".")


def is_installed() -> bool:
    """Say whether forms can be made."""
    return importlib.util.find_spec("llguidance") is not None
