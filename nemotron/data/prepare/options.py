"""The options of `nemotron data prepare` that change its output."""

import json
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from nemotron.data.config import ChatOptions, PreferenceOptions
from nemotron.data.correct.pair import PairOptions
from nemotron.errors import UserError
from nemotron.section import Section

COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "~": lambda value, pattern: re.search(pattern, value) is not None,
}


class HubOptions(Section):
    """Which part of a data set is read."""

    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False


class PrepareOptions(Section):
    """Everything that the output depends on, besides the input and the tokenizer."""

    column: str = "text"
    filters: Annotated[tuple[str, ...], Field(strict=False)] = ()
    separator: str | None = None
    """Text between two documents of a text file; absent: a file is one document."""
    eod_token: str = "</s>"
    validation_fraction: float = Field(0.01, ge=0, lt=1)
    max_row_bytes: int = Field(1 << 28, gt=0)
    """A longer row of a JSON-lines file counts as unreadable, so that memory stays bounded."""
    hub: HubOptions = HubOptions()
    chat: ChatOptions | None = None
    pairs: PairOptions | None = None
    preferences: PreferenceOptions | None = None

    @property
    def adds_ends(self) -> bool:
        """Whether each document gets the end of document; conversations and pairs do not."""
        return self.chat is None and self.pairs is None and self.preferences is None

    @property
    def is_supervised(self) -> bool:
        """Whether the shards say which tokens are learned."""
        chats = self.chat is not None or self.preferences is not None
        return chats or (self.pairs is not None and self.pairs.form == "chat")

    def described(self) -> dict[str, Any]:  # Any: what JSON holds
        """Return the options as a manifest has them."""
        absent = {name for name in ("pairs", "preferences") if getattr(self, name) is None}
        return self.model_dump(mode="json", exclude=absent)


@dataclass(frozen=True)
class Filter:
    """A comparison that a row must pass, such as `score >= 0.5`."""

    column: str
    comparison: str
    value: Any  # Any: text, number or truth value

    def passes(self, row: Mapping[str, Any]) -> bool:
        """Say whether a row passes; one without the column, or of another type, does not."""
        try:
            return COMPARISONS[self.comparison](row[self.column], self.value)
        except (KeyError, TypeError):
            return False


def parse_filter(text: str) -> Filter:
    """Read a filter as a user writes it: COLUMN, a comparison, a JSON value or plain text.

    Raises:
        UserError: when the text is not a filter.
    """
    match = re.fullmatch(r"\s*([\w.-]+)\s*(==|!=|>=|<=|>|<|~)\s*(.+?)\s*", text)
    if match is None:
        raise UserError(
            "is not a comparison; write for example 'score >= 0.5', 'lang == en' or "
            "'url ~ ^https'.",
            key="--filter",
            value=text,
        )
    column, comparison, value = match.groups()
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        parsed = value
    if comparison == "~":
        try:
            re.compile(parsed := value)
        except re.error as error:
            rule = f"is not a regular expression: {error}; correct the pattern."
            raise UserError(rule, key="--filter", value=text) from None
    return Filter(column, comparison, parsed)
