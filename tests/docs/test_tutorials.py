"""The tutorials, from the first command to the last, with runs of a few steps."""

import shlex
import shutil
from pathlib import Path

import pytest

from nemotron.cli import run
from nemotron.exit_codes import DONE
from tests.support.embedded import fill_cache
from tests.support.pages import ROOT, blocks

SMALL = """
extends: SMOKE
name: tiny
model: {moe_latent_size: 32}
schedule: {total_steps: 3, warmup_steps: 1, decay_steps: 1}
checkpoint: {every_steps: 1, keep: 3}
evaluation: {tokens: 128}
device: cpu
"""
SHORTER = {
    "evaluate --suite": ["--tasks", "1", "--max-new-tokens", "2"],
    "check-parity": ["--rows", "1", "--new-tokens", "2"],
    "generate": ["--max-new-tokens", "2"],
    "export": ["--no-check"],
    "quantize": ["--rows", "1", "--no-check"],
}
"""What a command gets in addition, by its first words."""
ELSEWHERE = {"serve", "chat", "lm-eval", "doctor"}
"""Commands that go on until they are stopped, need a package or look at the machine: other tests
run them."""


def lines(page: str) -> list[list[str]]:
    """Return the commands of a page in order, without `nemotron`."""
    words = [
        shlex.split(line, comments=True)
        for block in blocks("sh")
        if block.page.name == page
        for line in block.text.splitlines()
    ]
    return [found[1:] for found in words if found and found[0] == "nemotron"]


@pytest.fixture
def newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder whose recipes tiny/pretrain and tiny/smoke take seconds."""
    (tmp_path / "tiny").mkdir()
    shutil.copy(ROOT / "recipes/tiny/model.yaml", tmp_path / "tiny/model.yaml")
    shutil.copy(ROOT / "recipes/tiny/smoke.yaml", tmp_path / "tiny/whole.yaml")
    for name in ("pretrain", "smoke"):
        text = SMALL.replace("SMOKE", "whole.yaml")
        if name == "smoke":
            text = text.replace("name: tiny", "name: smoke")
        (tmp_path / f"tiny/{name}.yaml").write_text(text)
    fill_cache(tmp_path / "runs/.cache")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def follow(page: str) -> list[str]:
    """Run the commands of a page; return the names of those that ran."""
    done = []
    for words in lines(page):
        if words[0] in ELSEWHERE:
            continue
        own = [word.replace("tiny/pretrain", "tiny/pretrain.yaml") for word in words]
        own = [word.replace("tiny/smoke", "tiny/smoke.yaml") for word in own]
        more = [
            extra
            for begin, found in SHORTER.items()
            if set(begin.split()) <= set(words)
            for extra in found
        ]
        assert run([*own, *more]) == DONE, words
        done.append(words[0])
    return done


@pytest.mark.slow
def test_the_first_run(newcomer: Path):
    done = follow("first_run.md")
    assert {"train", "runs", "report", "evaluate", "compare", "generate", "export"} <= {*done}
    assert (newcomer / "runs/tiny/report.html").is_file()
    assert (newcomer / "exported/tiny/config.json").is_file()


@pytest.mark.slow
def test_quantize_and_serve(newcomer: Path):
    for name in ("mine", "assistant"):
        assert run(["train", "tiny/pretrain.yaml", f"name={name}"]) == DONE
    done = follow("ship.md")
    assert {"evaluate", "check-parity", "merge", "export", "quantize"} <= {*done}
    assert (newcomer / "small/merged/quantization.json").is_file()
