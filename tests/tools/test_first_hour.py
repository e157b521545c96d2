"""The tool that follows the README has every command that the README shows."""

import re
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.pages import ROOT

LATER = {"serve", "lm-eval"}
"""They need a client, or another package."""


def command_of(words: str) -> str:
    """Return the name of a command, without its arguments."""
    first, _, rest = words.partition(" ")
    return f"{first} {rest.split()[0]}" if first in ("recipe", "data") else first


@pytest.fixture
def first_hour(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "tools")
    sys.modules.pop("first_hour", None)
    import first_hour

    return first_hour


def test_the_first_hour_has_every_command_of_the_readme(first_hour: ModuleType):
    page = (ROOT / "README.md").read_text()
    shown = {
        command_of(words) for words in re.findall(r"(?:^|`)nemotron ([a-z][^`\n]*)", page, re.M)
    }
    followed = {command_of(words.partition("nemotron ")[2]) for _, words in first_hour.README}
    assert len(shown) > 12
    assert shown - followed - LATER == {"recipe list"}  # which `use` gives


@pytest.mark.parametrize(
    ("problem", "kind"),
    [
        ("WARNING: Retrying (Retry(total=4)) after connection broken", "Unreachable"),
        ("ERROR: No matching distribution found for torch==0", "Failed"),
        (None, "Unreachable"),
    ],
)
def test_a_slow_or_absent_index_is_known_from_other_faults(
    problem: str | None, kind: str, first_hour: ModuleType, tmp_path: Path
):
    pip = tmp_path / "python"  # that of a version, and of pip
    answer = "exec sleep 60" if problem is None else f"echo '{problem}' >&2; exit 1"
    pip.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo 3.13 && exit\n{answer}\n')
    pip.chmod(0o755)
    until = time.monotonic() + (0.2 if problem is None else 60)
    with pytest.raises(getattr(first_hour, kind), match="pip install torch"):
        first_hour.run_pip(until, str(pip), "install", "torch")
