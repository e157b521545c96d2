"""Steps that went wrong: skipped alike, rolled back before, never computed again."""

import json
from pathlib import Path

import pytest
import torch

from nemotron.checkpoint.find import newest
from nemotron.checkpoint.read import read_state
from nemotron.checkpoint.state import PassedOver
from nemotron.run.metrics import ABANDONED, read_metrics
from nemotron.train.start import train
from tests.support.cases import further
from tests.support.same_run import assert_same_run, final_tensors
from tests.support.tiny_run import build_recipe

SCHEDULE = {"peak": 1e-2, "total_steps": 12, "warmup_steps": 2, "decay_steps": 3}
BAD = [{"kind": "nan_gradient", "step": step} for step in (6, 7, 9)]
SAVED = {"every_steps": 2, "keep": 4}


@pytest.fixture
def rolling(recipe):
    """A run that meets three bad steps, and is rolled back before them."""

    def build(name: str, checkpoint: dict = SAVED, **reliability):
        values = {"rollback_after": 3, "rollback_window": 8, "faults": BAD} | reliability
        return recipe(name, schedule=SCHEDULE, checkpoint=checkpoint, reliability=values)

    return build


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory, shards) -> Path:
    """The folder of such a run that nothing interrupted."""
    reliability = {"rollback_after": 3, "rollback_window": 8, "faults": BAD}
    changes = {"schedule": SCHEDULE, "checkpoint": SAVED, "reliability": reliability}
    config = build_recipe(tmp_path_factory.mktemp("rolled"), shards, "rolled", **changes)
    assert train(config) == 0
    return folder_of(config)


def folder_of(config) -> Path:
    return Path(config.output) / config.name


def test_a_run_goes_back_before_the_bad_steps_and_passes_over_them(rolled_back):
    run = rolled_back
    out = (run / "log.txt").read_text()
    assert "warning    a fault is injected: nan_gradient in step 6 on all ranks" in out
    assert "3 steps from 6 to 9 were skipped; rolled back to step-00000004" in out
    records = read_metrics(run / "metrics.jsonl")
    steps = [r["step"] for r in records if r["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 10, 11, 12]
    events = [(r["step"], r["event"]) for r in records if r["kind"] == "event"]
    assert events == [(6, "passing over steps 6 to 9, with the weights of step 4")]
    abandoned = read_metrics(run / ABANDONED)
    assert [r["step"] for r in abandoned if r["kind"] == "train"] == [5, 6, 7, 8, 9]
    info = newest(run / "checkpoints").info
    state = read_state(info).trainer
    assert state is not None
    assert state.passed_over == [PassedOver(first=5, last=8, origin=4)]
    assert json.loads((info.folder / "state.json").read_text())["trainer"]["passed_over"] == [
        [5, 8, 4]
    ]
    assert state.tokens == 12 * 155
    assert state.skipped_steps == 0


@pytest.mark.slow
def test_after_going_back_every_bit_is_that_of_a_run_that_never_met_those_steps(
    rolling, rolled_back
):
    # stopped at the checkpoint, told to pass over, and resumed
    other = rolling("told", faults=[])
    assert train(other, stop_at=4) == 75
    info = newest(folder_of(other) / "checkpoints").info
    path = info.folder / "state.json"
    state = json.loads(path.read_text())
    state["trainer"]["passed_over"] = [[5, 8, 4]]
    path.write_text(json.dumps(state))
    replace_in_manifest(info.folder, "state.json")
    assert train(other, resume=True) == 0

    tensors, others = final_tensors(rolled_back), final_tensors(folder_of(other))
    assert all(torch.equal(tensors[name], others[name]) for name in others)


@pytest.mark.slow
def test_going_back_is_the_same_when_checkpoints_are_written_beside_training(rolling, rolled_back):
    config = rolling("beside", SAVED | {"background": True})
    assert train(config) == 0
    assert_same_run(folder_of(config), rolled_back)


@pytest.mark.parametrize("stops", [further([6]), further([8]), [4, 7, 11]])
@pytest.mark.slow
def test_a_run_that_is_stopped_around_a_rollback_resumes_to_the_same_bits(
    rolling, rolled_back, stops
):
    parts = rolling("parts")
    for stop in stops:
        assert train(parts, stop_at=stop, resume=True) == 75
    assert train(parts, resume=True) == 0
    assert_same_run(folder_of(parts), rolled_back)


def test_a_run_that_keeps_failing_from_one_checkpoint_gives_up(rolling, capsys):
    faults = [{"kind": "nan_gradient", "step": 5, "last_step": 12}]
    config = rolling("hopeless", faults=faults, rollback_after=2)
    assert train(config) == 1
    assert "and the run was rolled back to step 4 3 times" in capsys.readouterr().out


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(recipe, capsys):
    faults = [{"kind": "nan_gradient", "step": 1, "last_step": 3}]
    values = {"rollback_after": 3, "faults": faults}
    config = recipe("early", reliability=values, checkpoint={"every_steps": 5})
    assert train(config) == 1
    assert "there is no whole checkpoint to roll back to" in capsys.readouterr().out


@pytest.mark.slow
def test_a_spike_is_skipped_and_the_run_goes_on(recipe):
    schedule = {"kind": "constant", "peak": 1e-4, "total_steps": 36}
    batch = {"global_tokens": 31, "micro_batch": 1}
    faults = [{"kind": "spike", "step": 34}]
    values = {"spike_sigmas": 20.0, "faults": faults}
    config = recipe("spike", schedule=schedule, batch=batch, reliability=values)
    assert train(config) == 0
    events = [r for r in read_metrics(folder_of(config) / "metrics.jsonl") if r["kind"] == "event"]
    assert [r["step"] for r in events] == [34]
    assert "skipped the update: loss or gradient norm is far above" in events[0]["event"]
    state = read_state(newest(folder_of(config) / "checkpoints").info).trainer
    assert state is not None
    assert state.skipped_steps == 1
    assert len(state.recent_losses) == len(state.recent_grad_norms) == 35


def replace_in_manifest(folder: Path, name: str) -> None:
    from nemotron.checkpoint.manifest import describe_file

    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = describe_file(folder / name).model_dump()
    path.write_text(json.dumps(manifest))
