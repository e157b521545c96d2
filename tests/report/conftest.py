"""One small run, trained through the command line, in which something of everything happened."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nemotron.cli import run

RECIPE = """\
extends: tiny/smoke
name: base
output: runs
device: cpu
precision:
  compute: bf16
  switches: [{step: 8, preset: mxfp8}]
schedule: {total_steps: 9, decay_steps: 3}
evaluation: {every_steps: 3, tokens: 256}
checkpoint: {every_steps: 4, keep: 3}
reliability:
  faults: [{kind: nan_gradient, step: 5}]
"""


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that skipped an update, was stopped after step 6 and resumed, in a folder `runs`."""
    world = tmp_path_factory.mktemp("trained")
    (world / "mine.yaml").write_text(RECIPE)
    observed = ["precision.observe_every_steps=1", "logging.every_steps=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        command = ["train", "mine.yaml", *observed]
        assert run([*command, "--stop-at", "6"]) == 75
        assert run([*command, "--resume"]) == 0
    return world / "runs" / "base"


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies the run to a folder of the test's own, under another name."""

    def make(name: str = "mine") -> Path:
        return Path(shutil.copytree(trained, tmp_path / "runs" / name))

    return make
