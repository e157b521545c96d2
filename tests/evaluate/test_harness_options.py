"""Options for tasks of lm-evaluation-harness, without that package."""

import importlib.util
from pathlib import Path

import pytest

from nemotron.cli import run


def test_options_that_have_no_effect_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cases = [
        (["--limit", "3"], "--limit goes with --lm-eval TASK"),
        (["--no-thinking"], "--no-thinking goes with --lm-eval TASK"),
        (["--samples", "x.jsonl"], "--samples goes with --lm-eval TASK"),
        (["--lm-eval", "mmlu", "--recipe", "x.yaml"], "bring their own text"),
        (["--lm-eval", "mmlu", "evaluation.tokens=3"], "bring their own text"),
        (["--lm-eval", "mmlu", "--no-thinking"], "--no-thinking goes with --chat"),
    ]
    for words, said in cases:
        capsys.readouterr()
        place = [word for word in words if "=" in word]
        rest = [word for word in words if "=" not in word]
        assert run(["evaluate", str(tmp_path), *place, *rest]) == 2, words
        [sentence] = capsys.readouterr().err.strip().splitlines()
        assert said in sentence


def test_the_absent_package_is_named_with_the_line_that_installs_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: None if name == "lm_eval" else find(name)
    )
    assert run(["evaluate", str(tmp_path), "--lm-eval", "mmlu"]) == 2
    [sentence] = capsys.readouterr().err.strip().splitlines()
    assert "pip install 'nemotron-train[lm-eval]'" in sentence
