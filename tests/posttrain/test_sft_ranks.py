"""Fine-tuning on two processes: the loss of one process, however uneven their tokens are."""

import pytest
import torch

from nemotron.checkpoint.read import read_model
from nemotron.posttrain.sft_config import SftConfig
from nemotron.run.metrics import read_metrics
from tests.support.cases import further
from tests.support.fine_tuning import Workplace
from tests.support.job import Job

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("objective", ["tokens", further("samples")])
def test_two_ranks_learn_what_one_learns(workplace: Workplace, objective: str) -> None:
    losses, weights = [], []
    for world in (1, 2):
        name = f"{objective}-{world}"
        values = workplace.values(name, data={"objective": objective}, schedule={"peak": 1e-3})
        job = Job(SftConfig.model_validate(values), world=world)
        assert job.wait() == [0] * world, job.text()
        lines = read_metrics(job.run / "metrics.jsonl")
        losses.append([line["loss/main"] for line in lines if line["kind"] == "train"])
        weights.append(read_model(job.run)[1])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    for name, tensor in weights[0].items():
        # float32 gradients summed in another order
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("kind", "parallel"), [further(("lora", {})), ("dora", {"dp_replicate": 2, "dp_shard": 1})]
)
def test_adapters_are_sharded_as_weights_are(
    workplace: Workplace, kind: str, parallel: dict
) -> None:
    weights = []
    for world in (1, 2):
        values = workplace.values(
            f"{kind}-{world}",
            tune={"adapter": {"kind": kind, "rank": 3, "alpha": 6}},
            schedule={"peak": 1e-2, "total_steps": 2},
            parallel=parallel if world == 2 else {},
            reliability={"check_replicas_every_steps": 1},
        )
        job = Job(SftConfig.model_validate(values), world=world)
        assert job.wait() == [0] * world, job.text()
        weights.append(read_model(job.run)[1])
    base = read_model(workplace.runs / "base")[1]
    name = "backbone.layers.0.mixer.in_proj.weight"
    assert not torch.equal(weights[0][name], base[name])
    for name, tensor in weights[0].items():
        # float32 gradients summed in another order
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-6, msg=name)
