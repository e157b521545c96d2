"""Reinforcement learning through the real command: it runs, learns from what it says, resumes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron.checkpoint.read import read_model
from nemotron.cli import run
from nemotron.posttrain import workers
from tests.support.cases import further
from tests.support.rl import rl_values, write_recipe


@pytest.fixture
def recipe(tmp_path: Path):
    """Writes a recipe of this name; keyword arguments replace or add keys of sections."""

    def write(name: str, **changes: dict[str, Any]) -> Path:
        return write_recipe(tmp_path, name, rl_values(**changes))

    return write


def environments(*names: str) -> list[dict[str, str]]:
    return [{"name": name} for name in names]


def arithmetic(**more: Any) -> dict[str, Any]:
    return {"environments": environments("arith_chain"), **more}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_model(folder)[1]


def metrics(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def figures(folder: Path) -> list[dict[str, Any]]:
    """Return what was logged about each step, but for what a clock measured."""
    measured = ("perf/", "mem/", "rl/rollout_s", "rl/verify_s", "rl/score_s")
    lines = metrics(folder, "train")
    return [{k: v for k, v in line.items() if not k.startswith(measured)} for line in lines]


def rollouts(folder: Path, step: int) -> list[dict[str, Any]]:
    text = (folder / "rollouts" / f"step-{step:08}.jsonl").read_text()
    return list(map(json.loads, text.splitlines()))


def test_a_run_writes_its_rollouts_and_their_figures(recipe, tmp_path: Path) -> None:
    assert run(["train", str(recipe("whole", rollout=arithmetic()))]) == 0
    folder = tmp_path / "runs" / "whole"
    lines = metrics(folder, "train")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        answers = rollouts(folder, line["step"] - 1)
        assert len(answers) == 12
        rewards = [answer["verdict"]["reward"] for answer in answers]
        assert line["rl/reward"] == pytest.approx(sum(rewards) / 12)
        # the engine and the trainer are the same modules in float32
        assert 1 <= line["rl/token_mult_prob_error"] < 1 + 1e-4
        for answer in answers:
            assert len(answer["tokens"]) == len(answer["logprobs"]) == len(answer["old_logprobs"])
            assert answer["logprobs"] == pytest.approx(answer["old_logprobs"], abs=1e-4)
    assert "validation/arith_chain/reward" in metrics(folder, "validation")[-1]


@pytest.mark.slow
@pytest.mark.parametrize(("updates", "lag"), [further((1, 0)), (2, 0), further((1, 1)), (2, 1)])
def test_a_stopped_run_goes_on_to_the_same_bits(
    recipe, tmp_path: Path, updates: int, lag: int
) -> None:
    """With two updates for each rollout batch the stop lies between them.

    With a lag the next batch is being answered then. A curriculum that raises the level at nothing
    draws by what it learned before the stop.
    """
    batch = {"global_tokens": 12 // updates * 47}
    plan = {"raise_at": 1e-9, "window": 4, "least_weight": 0.3}
    # a verdict that comes late on a busy machine would be a fault in one of the runs alone
    rollout = arithmetic(updates_per_step=updates, lag=lag, curriculum=plan, verify_timeout_s=100.0)
    whole = recipe(f"whole{updates}", rollout=rollout, batch=batch)
    parts = recipe(f"parts{updates}", rollout=rollout, batch=batch)
    assert run(["train", str(whole)]) == 0
    assert run(["train", str(parts), "--stop-at", "1"]) == 75
    own = tmp_path / "runs" / f"parts{updates}" / "recipe.yaml"
    assert run(["train", str(own), "--resume"]) == 0
    found, expected = (
        weights(tmp_path / "runs" / f"{name}{updates}") for name in ("parts", "whole")
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    for step in range(0, 4, updates):
        first, second = (
            rollouts(tmp_path / "runs" / f"{name}{updates}", step) for name in ("whole", "parts")
        )
        assert second == first
        assert all(answer["experts"] for answer in first)
        versions = {answer["version"] for answer in first}
        assert versions == {max(step - lag * updates, 0)}
    assert figures(tmp_path / "runs" / f"parts{updates}") == figures(
        tmp_path / "runs" / f"whole{updates}"
    )


@pytest.mark.slow
def test_a_prediction_block_that_is_not_unrolled_stays(recipe, tmp_path: Path) -> None:
    path = recipe("still", rollout=arithmetic(), loss={"mtp_num_depths": 0})
    assert run(["train", str(path), "--stop-at", "1"]) == 75
    first = weights(tmp_path / "runs" / "still")
    assert run(["train", str(path), "--resume"]) == 0
    last = weights(tmp_path / "runs" / "still")
    changed = {
        name.startswith("mtp.") for name in first if not torch.equal(first[name], last[name])
    }
    assert changed == {False}
    assert any(name.startswith("mtp.") for name in first)
    assert not any(
        key.startswith("loss/mtp") for key in metrics(tmp_path / "runs" / "still", "train")[-1]
    )


def test_several_environments_share_the_prompts(recipe, tmp_path: Path, capsys) -> None:
    path = recipe("two", data={"seq_len": 255}, batch={"global_tokens": 12 * 255})
    assert run(["train", str(path), "--stop-at", "2"]) == 75
    capsys.readouterr()
    named = {
        answer["task"]["environment"]
        for step in (0, 1)
        for answer in rollouts(tmp_path / "runs" / "two", step)
    }
    assert named == {"arith_chain", "mcqa"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rollout": arithmetic(environments=environments("arith"))}, "arith_chain"),
        ({"rollout": {"environments": []}}, "rollout.environments"),
        (
            {"rollout": {"environments": environments("mcqa", "mcqa")}},
            "names mcqa twice; give each",
        ),
        ({"batch": {"global_tokens": 47}}, "write 564"),
        ({"rollout": arithmetic(updates_per_step=3)}, "the nearest is 2"),
        (
            {"rollout": arithmetic(lag=1), "policy": {"correction": {"kind": "none"}}},
            "rollout.lag = 1 answers with older weights",
        ),
        (
            {"rollout": arithmetic(in_flight_weight_updates=True)},
            "rollout.in_flight_weight_updates = true replaces the weights of answers",
        ),
        (
            {"rollout": arithmetic(lag=1, tokens_per_weight_update=2)},
            "has no effect because rollout.in_flight_weight_updates = false",
        ),
        ({"policy": {"clip_low": 0.1}}, "has no effect because rollout.updates_per_step = 1"),
        ({"policy": {"kl_coefficient": 0.1}}, "compares with the weights of init_from"),
        ({"policy": {"kl_kind": "k1"}}, "policy.kl_coefficient = 0"),
        ({"parallel": {"tp": 2}}, "parallel.tp = 2 cannot score rollouts"),
        ({"data": {"seq_len": 8}, "batch": {"global_tokens": 96}}, "data.seq_len = 8"),
        ({"rollout": {"environments": environments("tool_calc_db")}}, "offers tools"),
        ({"data": {"mask_eod_loss": True}}, "written by the model"),
    ],
)
def test_a_mistake_is_one_sentence(recipe, tmp_path: Path, capsys, changes, said: str) -> None:
    assert run(["train", str(recipe("bad", **changes))]) == 2
    sentence = capsys.readouterr().err
    assert said in sentence
    assert len(sentence.strip().splitlines()) == 1
    assert not (tmp_path / "runs" / "bad" / "checkpoints").exists()


def test_answers_beside_a_verifier_fault_are_left_out(
    recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No verifier of a new process answers within a millisecond, so every answer is a fault."""
    monkeypatch.setattr(workers, "START_S", 0.0)
    path = recipe("faults", rollout=arithmetic(verify_timeout_s=0.001))
    assert run(["train", str(path), "--stop-at", "1"]) == 75
    [line] = metrics(tmp_path / "runs" / "faults", "train")
    assert line["rl/verifier_faults"] == line["rl/masked"] == 12
    assert line["skipped_steps"] == 1
