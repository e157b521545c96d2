"""Options for tasks of lm-evaluation-harness, without that package."""

import importlib.util
from pathlib import Path

import pytest

from nemotron.cli import run


def test_no_thinking_goes_with_chat(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["lm-eval", str(tmp_path), "mmlu", "--no-thinking"]) == 2
    assert "--no-thinking goes with --chat" in capsys.readouterr().err


def test_the_absent_package_is_named_with_the_line_that_installs_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: None if name == "lm_eval" else find(name)
    )
    assert run(["lm-eval", str(tmp_path), "mmlu"]) == 2
    [sentence] = capsys.readouterr().err.strip().splitlines()
    assert "pip install 'nemotron-train[lm-eval]'" in sentence
