"""Mistakes of the user as records: which setting, its value, the rule that it breaks, and where."""

import errno
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from nemotron.exit_codes import FAILED, INTERNAL_ERROR, INTERRUPTED, WRONG_INPUT

REFUSALS = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENOSPC,
    errno.EPERM,
    errno.EROFS,
    errno.ESTALE,
}
"""Errors of the machine, not of this program."""

FORBIDDEN = {errno.EACCES, errno.EPERM}
"""Those that a place of another name would not have."""

UNUSABLE_NAMES = {errno.ENAMETOOLONG, errno.ELOOP}


class _Absent:
    def __reduce__(self) -> str:
        return "ABSENT"  # the same object on every rank that an error travels to


ABSENT: Any = _Absent()
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

    The command line prints the sentence and exits with 2; no traceback is shown. It exits with 1 if
    the sentence is about an error of the machine, such as a full disk, which no other input would
    have prevented.
    """

    def __init__(
        self,
        rule: str,
        *,
        key: str = "",
        value: Any = ABSENT,
        where: str = "",
        because: OSError | None = None,
    ) -> None:
        """Make the sentence; `because` is the error of the machine that it is about."""
        super().__init__(rule)
        self.finding = Finding(key, rule, value, where)
        refused = because is not None and because.errno in REFUSALS - FORBIDDEN
        self.exit_code = FAILED if refused else WRONG_INPUT

    def __str__(self) -> str:
        return str(self.finding)

    def renamed(self, names: Mapping[str, str]) -> "UserError":
        """Return the error with the name that its setting has for the user, if it has another."""
        key = self.finding.key
        error = self.of(replace(self.finding, key=names.get(key, key)))
        error.exit_code = self.exit_code
        return error

    @classmethod
    def of(cls, finding: Finding, more: str = "") -> "UserError":
        """Return the error for a finding; `more` is added at its end."""
        error = cls(finding.rule + more)
        error.finding = replace(finding, rule=finding.rule + more)
        return error

    def at(self, where: str) -> "UserError":
        """Return the error with its place, before the place within that it has already."""
        inner = self.finding.where
        if inner and inner != where:
            where = f"{where}: {inner}"
        error = self.of(replace(self.finding, where=where))
        error.exit_code = self.exit_code
        return error


@contextmanager
def within(place: str) -> Iterator[None]:
    """Give a mistake that is found here this place, before the place that it has already.

    Raises:
        UserError: the mistake.
    """
    try:
        yield
    except UserError as error:
        raise error.at(place) from None


class RunFailed(Exception):
    """The end of a run that nobody's input explains: one sentence, and exit code 1."""


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


def exit_code(error: BaseException) -> int:
    """Return the code with which a command ends that this error ends."""
    if isinstance(error, UserError):
        return error.exit_code
    if is_of_name(error):
        return WRONG_INPUT
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    refused = isinstance(error, OSError) and error.errno in REFUSALS
    known = isinstance(error, RunFailed) or is_out_of_memory(error) or is_of_other_ranks(error)
    return FAILED if refused or known else INTERNAL_ERROR


def is_of_name(error: BaseException) -> bool:
    """Say whether another path would do: this one may not be used, or is no name of a file.

    Such a name is too long, holds a null character, or is a link to itself.
    """
    if isinstance(error, OSError):
        # without a name it is about a stream, or what the system does not let any program do
        is_forbidden = error.errno in FORBIDDEN and error.filename is not None
        return is_forbidden or error.errno in UNUSABLE_NAMES
    # what `Path.resolve` raises before Python 3.13
    is_loop = type(error) is RuntimeError and str(error).startswith("Symlink loop")
    return is_loop or (type(error) is ValueError and str(error) == "embedded null byte")


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether this machine or its GPU had too little memory."""
    # whoever has not imported torch cannot have this error of it
    torch = sys.modules.get("torch")
    of_torch = getattr(torch, "OutOfMemoryError", MemoryError)
    return isinstance(error, MemoryError | of_torch)


def is_of_other_ranks(error: BaseException) -> bool:
    """Say whether the connection to other ranks failed: they ended, or do not answer."""
    torch = sys.modules.get("torch.distributed")
    of_torch = getattr(torch, "DistError", ())
    # gloo raises nothing of its own, but names the file of its source
    of_gloo = isinstance(error, RuntimeError) and "gloo/" in str(error)
    return of_gloo or isinstance(error, of_torch)
