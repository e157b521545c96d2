"""The tool that follows the README has every command that the README shows."""

import re
import sys

import pytest

from tests.support.pages import ROOT

LATER = {"serve", "lm-eval"}
"""They need a client, or another package."""


def command_of(words: str) -> str:
    """Return the name of a command, without its arguments."""
    first, _, rest = words.partition(" ")
    return f"{first} {rest.split()[0]}" if first in ("recipe", "data") else first


def test_the_first_hour_has_every_command_of_the_readme(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    sys.modules.pop("first_hour", None)
    from first_hour import README

    page = (ROOT / "README.md").read_text()
    shown = {
        command_of(words) for words in re.findall(r"(?:^|`)nemotron ([a-z][^`\n]*)", page, re.M)
    }
    followed = {command_of(words.partition("nemotron ")[2]) for _, words in README}
    assert len(shown) > 12
    assert shown - followed - LATER == {"recipe list"}  # which `use` gives
