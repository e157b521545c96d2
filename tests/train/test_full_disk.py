"""A disk that is full for a while, and a folder that goes away, while a run trains."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemotron.run.folder import dump_recipe
from nemotron.train.config import PretrainConfig
from nemotron.train.start import train
from tests.support import forked
from tests.support.same_run import assert_same_run
from tests.support.small_disk import Filler, small_disk
from tests.support.tiny_run import build_recipe

STEPS = 40
CHANGES = {
    "batch": {"global_tokens": 31 * 4, "micro_batch": 2},
    "schedule": {"kind": "constant", "peak": 1e-3, "total_steps": STEPS},
    "checkpoint": {"every_steps": 5, "keep": 2},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shards) -> Path:
    """Return the folder of the same run on a disk with room."""
    config = build_recipe(tmp_path_factory.mktemp("whole"), shards, "whole", **CHANGES)
    assert train(config) == 0
    return config.run_path


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as folder:
        yield folder


def started(config: PretrainConfig, *options: str) -> forked.Forked:
    folder = Path(config.output).parent
    recipe = folder.with_name(f"{config.name}.yaml")
    recipe.write_text(dump_recipe(config))
    return forked.command("train", recipe, *options, output=folder.with_name(f"{config.name}.txt"))


def status(config: PretrainConfig) -> dict:
    return json.loads((config.run_path / "status.json").read_text())


def test_training_goes_on_while_the_disk_is_full_and_nothing_is_missing_afterwards(
    disk, shards, whole
):
    config = build_recipe(disk, shards, "full", **CHANGES)
    run = started(config)
    run.wait_for_text("step  7/")
    filler = Filler(disk)
    run.wait_for_text("cannot be written: No space left on device; training goes on")
    run.wait_for_text("step-00000015 was not saved: No space left on device")
    filler.remove()
    assert run.wait() == 0, run.text
    assert_same_run(config.run_path, whole)
    assert run.text.count("cannot be written") == 1
    assert run.text.count("is written now") == 1
    assert status(config) == {"state": "done", "step": STEPS, "exit_code": 0}
    log = (config.run_path / "log.txt").read_text()
    assert all(f"step {step:>2}/{STEPS} " in log for step in range(1, STEPS + 1))


def test_a_run_that_ends_on_a_full_disk_says_so_and_resumes_when_there_is_room(disk, shards, whole):
    config = build_recipe(disk, shards, "full", **CHANGES)
    run = started(config)
    run.wait_for_text("step  7/")
    filler = Filler(disk)
    assert run.wait() == 1, run.text
    last = run.text.splitlines()[-2:]
    assert last[0].startswith("failed: checkpoint ")
    assert last[1] == "the newest checkpoint is step-00000005"
    reason = last[0].removeprefix("failed: ")
    known = {"state": "failed", "step": STEPS, "exit_code": 1, "reason": reason}
    assert status(config) == known
    refused = started(config, "--resume")
    assert refused.wait() == 1
    assert "No space left on device; make room there, or set `output`" in refused.text
    filler.remove()
    again = started(config, "--resume")
    assert again.wait() == 0, again.text
    assert_same_run(config.run_path, whole)


@pytest.mark.parametrize("how", ["removed", "renamed"])
def test_a_folder_that_goes_away_ends_the_run_and_is_not_made_anew(recipe, how):
    config = recipe(how, **CHANGES)
    run, folder = started(config), config.run_path
    run.wait_for_text("step  7/")
    if how == "renamed":
        folder.rename(folder.with_name("elsewhere"))
    while how == "removed" and folder.exists():  # files come while it is being removed
        shutil.rmtree(folder, ignore_errors=True)
    assert run.wait() == 1, run.text
    sentence = run.text.splitlines()[-1]
    assert sentence.startswith(f"nemotron: failed: the folder of this run, {folder}, was removed")
    assert not folder.exists()
    if how == "renamed":
        folder.with_name("elsewhere").rename(folder)
        assert started(config, "--resume").wait() == 0
