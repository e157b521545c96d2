"""Reinforcement learning on two processes: what one process does, to the rounding of sums."""

import json
from pathlib import Path

import pytest
import torch

from nemotron.checkpoint.read import read_model
from nemotron.posttrain.config import RlConfig
from tests.support.job import Job
from tests.support.tiny_run import MODEL

pytestmark = pytest.mark.distributed


def build(
    folder: Path, name: str, lag: int = 0, *, in_flight: bool = False, **parallel: int
) -> RlConfig:
    return RlConfig.model_validate(
        {
            "name": name,
            "output": str(folder / "runs"),
            "device": "cpu",
            "model": MODEL | {"n_routed_experts": 6},
            "data": {"seq_len": 255},
            "rollout": {
                # some constraints are met by any text, so that some rewards are not 0
                "environments": [{"name": "if_constraints"}],
                "prompt": "text",
                "num_prompts_per_step": 12,
                "num_generations_per_prompt": 3,
                "max_new_tokens": 12,
                "evaluation_tasks": 3,
                "truncated": "keep",
                "lag": lag,
                "in_flight_weight_updates": in_flight,
                "verify_timeout_s": 100.0,  # a busy machine takes its time
            },
            "advantage": {"baseline": "none", "scale": "none"},
            "batch": {"global_tokens": 36 * 255, "micro_batch": 2},
            # SGD-like: AdamW's first steps make a whole step of any rounding of a gradient
            "optimizer": {"eps": 1e-2},
            "schedule": {"kind": "constant", "peak": 1e-3, "total_steps": 2 + lag},
            "parallel": parallel,
        }
    )


@pytest.mark.nightly
def test_two_ranks_learn_what_one_learns(tmp_path: Path) -> None:
    found = {}
    for name, world, parallel in (("one", 1, {}), ("two", 2, {}), ("experts", 2, {"ep": 2})):
        job = Job(build(tmp_path, name, **parallel), world=world)
        assert job.wait() == [0] * world, job.text()
        found[name] = read_model(job.run)[1]
        lines = (job.run / "rollouts" / "step-00000000.jsonl").read_text().splitlines()
        assert any(json.loads(line)["advantage"] for line in lines)
        assert all(json.loads(line)["experts"] for line in lines)
    check(found)


@pytest.mark.nightly
def test_ranks_that_answer_ahead_learn_what_one_does(tmp_path: Path) -> None:
    found = {}
    for name, world in (("one", 1), ("two", 2)):
        job = Job(build(tmp_path, name, lag=1), world=world)
        assert job.wait() == [0] * world, job.text()
        found[name] = read_model(job.run)[1]
        lines = (job.run / "rollouts" / "step-00000002.jsonl").read_text().splitlines()
        assert {json.loads(line)["version"] for line in lines} == {1}
    check(found)


@pytest.mark.nightly
def test_ranks_whose_answers_get_new_weights_learn_what_one_does(tmp_path: Path) -> None:
    found = {}
    for name, world in (("one", 1), ("two", 2)):
        job = Job(build(tmp_path, name, lag=1, in_flight=True), world=world)
        assert job.wait() == [0] * world, job.text()
        found[name] = read_model(job.run)[1]
        lines = (job.run / "rollouts" / "step-00000002.jsonl").read_text().splitlines()
        assert [[0, 1], [6, 2]] in [json.loads(line)["versions"] for line in lines]
    check(found)


def check(found: dict[str, dict[str, torch.Tensor]]) -> None:
    """Compare the weights of each run with those of one process."""
    for name, weights in found.items():
        for key, tensor in found["one"].items():
            # float32 gradients summed in another order
            torch.testing.assert_close(
                weights[key], tensor, rtol=1e-4, atol=1e-6, msg=f"{name}: {key}"
            )
