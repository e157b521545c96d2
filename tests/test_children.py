"""No module of the current folder is executed, where a user's data may lie."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron.children import ROOT, module_command

NAMES = ("torch", "numpy", "random", "tempfile", "signal", "selectors", "json", "tokenizers")


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A folder with data, beside which lie modules that leave a mark when they are executed."""
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(
            "open('executed', 'w').close()\nraise SystemExit(99)\n"
        )
    (tmp_path / "rows.jsonl").write_text('{"text": "The river runs."}\n' * 40)
    return tmp_path


def call(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    # PYTHONPATH stands for an installation
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    environment["PYTHONPATH"] = ROOT
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_preparation_and_its_workers_execute_nothing_beside_the_data(planted: Path):
    words = ["data", "prepare", "rows.jsonl", "--out", "out", "--workers", "2"]
    done = call(planted, sys.executable, "-m", "nemotron", *words)
    assert done.returncode == 0, done.stderr
    assert not (planted / "executed").exists()


def test_a_child_executes_nothing_beside_the_data(planted: Path):
    done = call(planted, *module_command("nemotron.hf.selfcheck"))
    assert done.returncode != 99, done.stderr
    assert "selfcheck" in done.stderr
    assert not (planted / "executed").exists()
    done = call(planted, sys.executable, "-m", "nemotron.hf.selfcheck")
    assert (planted / "executed").exists(), "the plant does not work"
