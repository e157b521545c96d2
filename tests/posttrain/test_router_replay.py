"""Router replay: the trainer sends tokens where the engine sent them, and learns the same."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from nemotron.cli import run
from nemotron.data.batch import Batch
from nemotron.generate.routing import recorded
from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM
from nemotron.model.router import routers
from nemotron.posttrain import grading
from nemotron.posttrain.config import RlConfig
from nemotron.posttrain.objective import ADVANTAGE, OLD, SAMPLED, PolicyObjective
from nemotron.posttrain.replay import Experts
from nemotron.train.auxiliary import Auxiliary
from nemotron.train.config import LossConfig
from nemotron.train.loss import compute_sums
from tests.support.rl import rl_values, write_recipe
from tests.support.tiny_run import MODEL

LOUD = {"initializer_range": 0.4}
"""Weights large enough that another expert says something else."""


@contextmanager
def flipped(model: HybridLM) -> Iterator[None]:
    """Let every router choose other experts, as a bias does that only chooses and never weighs."""
    biases = [router.e_score_correction_bias for router in routers(model.backbone).values()]
    kept = [bias.clone() for bias in biases]
    for bias in biases:
        bias += torch.linspace(3, -3, len(bias))
    yield
    for bias, old in zip(biases, kept, strict=True):
        bias.copy_(old)


@pytest.fixture
def trainer_flips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the routers choose otherwise whenever the trainer scores answers."""
    real = grading.score

    def score(config: RlConfig, model: HybridLM, device: torch.device, batch: Batch):
        with flipped(model):
            return real(config, model, device, batch)

    monkeypatch.setattr(grading, "score", score)


def recipe(folder: Path, compute: str, scale: float = 0.4, **rollout: object) -> str:
    given = {"environments": [{"name": "arith_chain"}], "verify_timeout_s": 100.0, **rollout}
    model = {"initializer_range": scale}
    values = rl_values(rollout=given, model=model, precision={"compute": compute})
    return str(write_recipe(folder, compute, values))


def figures(folder: Path, name: str) -> list[dict[str, float]]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == "train"]


@pytest.mark.slow
@pytest.mark.usefixtures("trainer_flips")
def test_a_flip_stops_a_run_that_does_not_replay(tmp_path: Path, capsys) -> None:
    path = recipe(tmp_path, "fp32", router_replay=False)
    assert run(["train", path]) == 1
    said = capsys.readouterr().err
    assert "rl/token_mult_prob_error" in said
    assert "use router_replay: true" in said
    folder = tmp_path / "runs" / "fp32"
    assert not (folder / "metrics.jsonl").exists()
    assert len((folder / "rollouts" / "step-00000000.jsonl").read_text().splitlines()) == 12


@pytest.mark.slow
@pytest.mark.usefixtures("trainer_flips")
@pytest.mark.parametrize(
    # the rounding of bfloat16 alone gives 1.007 with weights of 0.2, and up to 1.020 with 0.4;
    # without replay the flip gives at least 1.066 with 0.2, which stops a run
    ("compute", "scale", "limit"),
    [("fp32", 0.4, 1 + 1e-4), ("bf16", 0.2, 1.02)],
)
def test_a_flip_changes_nothing_where_choices_are_replayed(
    tmp_path: Path, compute: str, scale: float, limit: float
) -> None:
    assert run(["train", recipe(tmp_path, compute, scale), "--stop-at", "1"]) == 75
    [line] = figures(tmp_path, compute)
    assert 1 <= line["rl/token_mult_prob_error"] <= limit
    assert line["rl/replay_tokens_differ"] > 0.5


@pytest.mark.slow
def test_without_a_flip_both_choose_the_same(tmp_path: Path) -> None:
    assert run(["train", recipe(tmp_path, "fp32"), "--stop-at", "1"]) == 75
    [line] = figures(tmp_path, "fp32")
    assert line["rl/replay_tokens_differ"] <= line["rl/replay_choices_differ"] < 0.05
    text = (tmp_path / "runs" / "fp32" / "rollouts" / "step-00000000.jsonl").read_text()
    form = Experts(layers=1, top_k=2, num_experts=5)
    for answer in map(json.loads, text.splitlines()):
        found = form.decode(answer["experts"])
        assert len(found) == len(answer["task"]["prompt"]) + len(answer["tokens"]) - 1
        assert found.min() >= 0
        # two different experts of each token
        assert (found[..., 0] != found[..., 1]).all()


@pytest.mark.parametrize("recompute", [False, True])
def test_the_loss_and_its_gradients_are_those_of_the_replayed_choice(recompute: bool) -> None:
    """Of a packed batch, with a block of prediction; the last token of each document is free."""
    model = HybridLM(ModelConfig.model_validate({**MODEL, **LOUD, "vocab_size": 97}))
    model.init_weights(3)
    for block in model.backbone.layers:
        block.recompute = recompute
    drawn = torch.Generator().manual_seed(4)
    ids, labels = torch.randint(1, 97, (2, 2, 19), generator=drawn)
    values = dict(
        zip((ADVANTAGE, OLD, SAMPLED), torch.randn(3, 2, 19, generator=drawn), strict=True)
    )
    seq_idx = (torch.arange(19) >= 8).int().expand(2, -1)
    batch = Batch(ids, labels, seq_idx, extras=values).look_ahead(1)
    config = RlConfig.model_validate(rl_values() | {"name": "unused"})
    objective = PolicyObjective(config.policy, Auxiliary(LossConfig(), 1, True))

    def gradients(batch: Batch) -> list[torch.Tensor]:
        model.zero_grad()
        terms, _ = compute_sums(objective, model, batch)
        objective.combine(terms, objective.counts(batch)).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with recorded(model, on=True) as record:
        model(ids, seq_idx)
    batch.experts = record.experts(2)
    expected = gradients(batch)
    assert expected
    batch.experts[:, 7], batch.experts[:, 18] = -1, -1
    for found, own in zip(gradients(batch), expected, strict=True):
        assert torch.equal(found, own)
    with flipped(model):
        batch.experts = record.experts(2)
        replayed = gradients(batch)
        batch.experts = None
        free = gradients(batch)
    for found, own in zip(replayed, expected, strict=True):
        assert torch.equal(found, own)
    router = [n for n, p in model.named_parameters() if p.grad is not None].index(
        "backbone.layers.1.mixer.gate.weight"
    )
    assert replayed[router].abs().sum() > 0
    assert any(not torch.equal(a, b) for a, b in zip(free, expected, strict=True))


@pytest.mark.parametrize("num_experts", [5, 255, 256, 512])
def test_choices_are_read_as_they_were_written(num_experts: int) -> None:
    form = Experts(layers=3, top_k=2, num_experts=num_experts)
    given = torch.randint(num_experts, (7, 3, 2)).to(torch.int16)
    given[4] = -1
    assert torch.equal(form.decode(form.encode(given)), given)


@pytest.mark.parametrize("num_experts", [5, 512])
def test_choices_of_another_model_are_refused(num_experts: int) -> None:
    written = Experts(3, 2, num_experts).encode(torch.full((7, 3, 2), num_experts - 1).short())
    with pytest.raises(ValueError, match="not among"):
        Experts(3, 2, num_experts - 1).decode(written)
    with pytest.raises(ValueError, match="not those of all tokens"):
        Experts(3, 2, num_experts).check(written, 7)
