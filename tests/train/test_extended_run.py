"""A finished run that is made longer: what may change, and what is said of the learning rate."""

from pathlib import Path

import pytest

from nemotron.cli import run
from nemotron.run.metrics import read_metrics
from nemotron.train.config import PretrainConfig
from nemotron.train.schedule import plan_training
from tests.support.tiny_run import MODEL

SHORT = ["train", "tiny/smoke", "device=cpu", "evaluation.tokens=64", "data.sources=[verse]"]
SHORTER = ["schedule.total_steps=4", "schedule.warmup_steps=1", "schedule.decay_steps=1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Return a folder with a finished run of 4 steps, whose rate has come down to 0."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run([*SHORT, *SHORTER]) == 0
    return folder


@pytest.fixture(autouse=True)
def here(world: Path, monkeypatch) -> None:
    monkeypatch.chdir(world)


def resume(*words: str) -> int:
    return run(["train", "runs/smoke", "--resume", *words])


def rates() -> list[float]:
    records = read_metrics(Path("runs/smoke/metrics.jsonl"))
    return [record["lr"] for record in records if record["kind"] == "train"]


def test_a_changed_key_is_refused_with_the_option_that_allows_it(capfd):
    assert resume("schedule.total_steps=6") == 2
    said = capfd.readouterr().err
    assert "schedule.total_steps was 4, is 6; restore these keys, allow the change with" in said
    assert "--allow-changed schedule.total_steps, or give the new run another name" in said


@pytest.mark.parametrize(
    "change", ["batch.global_tokens=512", "data.seq_len=32", "seed=5", "data.mask_eod_loss=true"]
)
def test_what_decides_the_rows_so_far_is_refused_with_a_way_out(change: str, capfd):
    key = change.split("=")[0]
    assert resume(change, "--allow-changed", key) == 2
    said = capfd.readouterr().err
    assert f"{key} was " in said
    assert "decides which rows the steps so far read, so --allow-changed does not help" in said
    assert "init_from=runs/smoke" in said


def test_a_changed_list_is_shown_as_a_recipe_has_it(capfd):
    assert resume("data.sources=[docs, verse]", "data.reset_documents=true") == 2
    said = capfd.readouterr().err
    assert "was [{name: verse, weight: 1.0}], is [{name: docs, weight: 1.0}, {name: v" in said
    assert "data.reset_documents was false, is true; " in said


@pytest.mark.parametrize(
    "change", ["optimizer.name=muon", "model.hidden_size=64", "model.tie_word_embeddings=true"]
)
def test_what_decides_the_tensors_is_refused_also_when_dry(change: str, capfd):
    section = change.split(".")[0]
    for words in ([], ["--dry-run"]):
        assert resume(change, "--allow-changed", section, *words) == 2
        said = capfd.readouterr().err
        assert "decides which tensors the checkpoints hold, so --allow-changed does not" in said
    assert resume(change) == 2
    assert "; restore these keys, or give the new run another name." in capfd.readouterr().err


def test_the_share_held_out_decides_the_rows(capfd):
    change = "data.validation_fraction=0.2"
    assert resume(change, "--allow-changed", "data") == 2
    assert "decides which rows the steps so far read" in capfd.readouterr().err


def test_a_phase_with_its_own_batch_and_rate_goes_on_smoothly_then_a_jump_is_said(capfd):
    first = "{name: first, steps: 4}"
    more = "{name: more, steps: 2, global_tokens: 512, schedule: {kind: linear, peak: 1e-5}}"
    allow = ["--allow-changed", "phases", "--allow-changed", "schedule"]
    assert resume(f"phases=[{first}, {more}]", "remove=schedule.total_steps", *allow) == 0
    said = capfd.readouterr().out
    assert "warning    the schedule is not that" not in said
    assert len(rates()) == 6
    assert rates()[3:5] == [0.0, 5e-6]
    # back to one schedule that is longer: its rate is the peak again, and the start says so
    again = f"{more}, {{name: last}}".replace("linear", "constant")
    assert resume(f"phases=[{first}, {again}]", "schedule.total_steps=6", *allow) == 0
    said = capfd.readouterr().out
    assert "the learning rate was 0.00e+00 at step 6, and goes on with 3.00e-03 at step 7" in said
    assert len(rates()) == 8
    assert resume() == 0
    assert "this run is finished" in capfd.readouterr().out


@pytest.mark.parametrize("sizes", [(100, 200, 300), (300, 200, 100)])
def test_lengths_in_steps_count_steps_of_any_size(sizes: tuple[int, int, int]):
    names = ("a", "b", "c")
    phases = [
        {"name": name, "steps": 7, "global_tokens": size}
        for name, size in zip(names, sizes, strict=True)
    ]
    del phases[2]["steps"]
    config = PretrainConfig.model_validate(
        {
            "name": "r",
            "model": MODEL,
            "data": {"seq_len": 10},
            "batch": {"global_tokens": 200},
            "schedule": {"peak": 1.0, "total_steps": 22, "warmup_steps": 8, "decay_steps": 9},
            "phases": phases,
        }
    )
    plan = plan_training(config)
    assert plan.num_steps == 22
    at_peak = [step for step in range(22) if plan.lr(step) == 1.0]
    assert at_peak == [7, 8, 9, 10, 11, 12]
    assert plan.lr(21) == 0.0
    assert 0.0 < plan.lr(20) < plan.lr(13) < 1.0
