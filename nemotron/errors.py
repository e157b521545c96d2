"""Mistakes of the user as records: which setting, its value, the rule that it breaks, and where."""

from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

ABSENT: Any = object()
"""The value of a finding about a key whose value says nothing, or which is not given."""


@dataclass(frozen=True)
class Finding:
    """A rule that a setting breaks, with what would be right."""

    key: str
    """Dotted, from the top of the recipe; empty when no single setting is meant."""
    rule: str
    value: Any = ABSENT
    where: str = ""
    """The file, with the line, or whatever else gave the setting."""

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        value = "" if self.value is ABSENT else f"= {show_value(self.value)} "
        return f"{place}{self.key}{' ' * bool(self.key)}{value}{self.rule}"


class UserError(Exception):
    """A mistake in what the user gave: one sentence that says what, where and what would be right.

    The command line prints the sentence and exits with 2; no traceback is shown.
    """

    def __init__(self, rule: str, *, key: str = "", value: Any = ABSENT, where: str = "") -> None:
        super().__init__(rule)
        self.finding = Finding(key, rule, value, where)

    def __str__(self) -> str:
        return str(self.finding)

    @classmethod
    def of(cls, finding: Finding, more: str = "") -> "UserError":
        """Return the error for a finding; `more` is added at its end."""
        error = cls(finding.rule + more)
        error.finding = replace(finding, rule=finding.rule + more)
        return error

    def at(self, where: str) -> "UserError":
        """Return the error with its place."""
        return self.of(replace(self.finding, where=where))


class RuleBroken(ValueError):
    """What a validator of a section raises, so that pydantic adds the section to the key."""

    def __init__(self, key: str, rule: str, value: Any = ABSENT) -> None:
        super().__init__(str(Finding(key, rule, value)))
        self.finding = Finding(key, rule, value)


def show_value(value: Any) -> str:
    """Return a value as a recipe writes it, cut to 60 characters unless it is a path."""
    text = "null" if value is None else str(value)
    if isinstance(value, bool):
        text = text.lower()
    return text if len(text) <= 60 or isinstance(value, PurePath) else text[:57] + "..."
