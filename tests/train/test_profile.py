"""Recorded steps: what lies in the folder, where the time went, and that the run stays the same."""

import gzip
import json
import re
import time
from pathlib import Path

import pytest
import torch

from nemotron.errors import UserError
from nemotron.model.config import ModelConfig
from nemotron.model.flops import training_flops_per_token
from nemotron.train.config import PretrainConfig
from nemotron.train.profile_table import REST, attribute, step_flops
from nemotron.train.start import train
from tests.support.job import Job
from tests.support.same_run import assert_same_run
from tests.support.tiny_run import MODEL


@pytest.mark.slow
def test_chosen_steps_are_recorded_and_the_run_stays_the_same(recipe, undisturbed: Path):
    config: PretrainConfig = recipe("recorded", profile={"steps": [4]})
    assert train(config) == 0
    assert_same_run(undisturbed, config.run_path)
    folder = config.run_path / "profile"
    [path] = folder.iterdir()
    assert path.name == "step-00000004-rank-0.json.gz"
    trace = json.loads(gzip.decompress(path.read_bytes()))
    marks = {event["name"] for event in trace["traceEvents"] if "nemotron: " in event["name"]}
    kinds = {"mamba", "attention", "moe", "mlp", "prediction"}
    assert {mark.removeprefix("nemotron: ") for mark in marks} == kinds
    text = (config.run_path / "log.txt").read_text()
    row = r"profile    (\w+) +[\d.,]+ G +[\d.]+% +([\d.]+) ms +([\d.]+) ms +[\d.]+%"
    found = {kind: (float(a), float(b)) for kind, a, b in re.findall(row, text)}
    assert set(found) == kinds
    assert all(forward > 0 and backward > 0 for forward, backward in found.values())
    assert "mean of 1" in text


def test_gradients_belong_to_the_layer_of_their_forward_pass():
    """A layer that is made slow backward alone is found there, recomputation or not."""

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            # by far the longest, also on a machine that is busy with something else
            time.sleep(1.0)
            return grad

    inputs = torch.ones(4, requires_grad=True)
    with torch.profiler.profile() as recorded:
        with torch.profiler.record_function("nemotron: mamba"):
            x = Slow.apply(inputs.sin())
        with torch.profiler.record_function("nemotron: moe"):
            x = torch.utils.checkpoint.checkpoint(lambda y: y.cos().exp(), x, use_reentrant=False)
        (x * 2).sum().backward()
    seconds = attribute(recorded.events(), on_gpu=False)
    assert set(seconds.forward) == {"mamba", "moe"}
    assert seconds.backward["mamba"] > 10 * seconds.forward["mamba"]
    assert seconds.backward["mamba"] > 5 * seconds.backward["moe"] > 0
    assert sum(seconds.backward.values()) < seconds.total


def test_the_flops_of_the_table_are_those_of_the_step():
    model = ModelConfig(**MODEL)
    flops = step_flops(model, 31, 2, 155)
    assert sum(flops.values()) == pytest.approx(155 * training_flops_per_token(model, 31, 2))
    assert list(flops)[-1] == REST


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        ({"steps": [3, 9]}, "profile.steps = [3, 9] has a step after the last one; give steps"),
        ({"steps": [3], "ranks": [0, 2]}, "profile.ranks = [0, 2] has a rank that is not there"),
    ],
)
def test_steps_and_ranks_that_are_not_there_are_refused(recipe, profile: dict, words: str):
    config = recipe("refused", profile=profile)
    with pytest.raises(UserError) as error:
        train(config)
    assert words in str(error.value)
    assert not config.run_path.exists()


@pytest.mark.distributed
def test_any_rank_can_be_recorded(on_two):
    profile = {"steps": [2], "ranks": [1], "memory": True}
    job = Job(on_two("second", steps=3, profile=profile))
    assert job.wait() == [0, 0], job.text()
    [path] = (job.run / "profile").iterdir()
    assert path.name == "step-00000002-rank-1.json.gz"
    assert "profile    rank 1 of 2" in (job.run / "ranks/rank-1.log").read_text()
