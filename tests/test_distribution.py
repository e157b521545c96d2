"""The installed program beside others: completion in a shell, a package of the same name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron import cli
from tests.support.pages import ROOT


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("nemotron re", ["recipe", "report"]), ("nemotron recipe c", ["check", "copy"])],
)
def test_the_shell_completes_commands(typed: str, offered: list[str], tmp_path: Path):
    program = tmp_path / "nemotron"
    program.write_text("from nemotron.__main__ import main\nmain()\n")
    asked = {"_NEMOTRON_COMPLETE": "complete_bash", "COMP_WORDS": typed}
    done = subprocess.run(
        [sys.executable, program],
        env=os.environ | asked | {"COMP_CWORD": str(typed.count(" ")), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == offered


def test_another_distribution_with_this_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    records = {
        "nemotron-9.1": "nemotron/__init__.py,sha256=x,1\n",
        "nemotron_train-0.1.0": "nemotron/__init__.py,sha256=x,1\n",
        "nemotron_tools-2.0": "nemotron_tools/__init__.py,sha256=x,1\n",
    }
    for name, record in records.items():
        (tmp_path / f"{name}.dist-info").mkdir()
        (tmp_path / f"{name}.dist-info" / "RECORD").write_text(record)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    [warning] = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: the distribution nemotron 9.1 also brings a package")
