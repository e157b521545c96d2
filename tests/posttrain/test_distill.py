"""Distillation: the divergence against plain PyTorch, and runs that learn from a teacher."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nemotron.checkpoint.read import read_model
from nemotron.cli import run
from nemotron.data.batch import NO_LABEL, Batch
from nemotron.model.hybrid import HybridLM
from nemotron.posttrain.distill import DistillObjective
from nemotron.posttrain.divergence import divergence
from nemotron.posttrain.sft_config import DistillationConfig, DistillConfig
from nemotron.posttrain.teacher import HIDDEN
from nemotron.run.metrics import read_metrics
from nemotron.train.auxiliary import Auxiliary
from nemotron.train.config import LossConfig
from nemotron.train.loss import compute_sums
from tests.support.fine_tuning import Workplace
from tests.support.job import Job
from tests.support.models import build, tokens
from tests.support.same_run import assert_same_run


def plain(config: DistillationConfig, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """The divergence of each row by torch's own function, top-k tokens and the rest apart."""
    pair = [(logits / config.temperature).softmax(-1) for logits in (ours, theirs)]
    if config.top_k is not None:
        top = pair[1].topk(config.top_k).indices
        pair = [
            torch.cat([p.gather(-1, top), 1 - p.gather(-1, top).sum(-1, keepdim=True)], -1)
            for p in pair
        ]
    student, teacher = pair if config.kind == "forward" else pair[::-1]
    found = F.kl_div(student.log(), teacher, reduction="none").sum(-1)
    return config.temperature**2 * found


CASES = [
    DistillationConfig(),
    DistillationConfig(kind="reverse", temperature=2.0),
    DistillationConfig(top_k=5),
    DistillationConfig(kind="reverse", top_k=7, temperature=0.5, cross_entropy=0.3),
]


@pytest.mark.parametrize("config", CASES, ids=str)
def test_loss_and_gradient_equal_plain_torch(config: DistillationConfig) -> None:
    student, teacher = build(seed=1), build(seed=8, hidden_size=18, mamba_num_heads=3)
    ids = tokens(2, 14)
    labels = ids[:, 1:].clone()
    labels[:, :4] = NO_LABEL
    weight = torch.linspace(0.2, 1.7, 26, dtype=torch.float64).view(2, 13)
    batch = Batch(ids[:, :-1], labels, None, weight)
    with torch.no_grad():
        batch = replace(batch, extras={HIDDEN: teacher(batch.input_ids)})
    own = DistillObjective(config, Auxiliary(LossConfig(), 0, False), teacher.lm_head)
    sums, _ = compute_sums(own, student, batch)
    loss = own.combine(sums, own.counts(batch))
    student.zero_grad()
    loss.backward()
    found = _gradients(student)

    counted = labels != NO_LABEL
    ours = student.logits(student(batch.input_ids))[counted]
    with torch.no_grad():
        theirs = teacher.logits(teacher(batch.input_ids))[counted]
    values = plain(config, ours, theirs)
    values = values + config.cross_entropy * F.cross_entropy(
        ours, labels[counted], reduction="none"
    )
    expected = (values * weight[counted]).sum() / weight[counted].sum()
    student.zero_grad()
    expected.backward()
    assert abs(loss.item() - expected.item()) <= 1e-10
    for name, gradient in _gradients(student).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11)


def _gradients(model: HybridLM) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_equal_distributions_do_not_diverge() -> None:
    logits = torch.randn(3, 11)
    for config in CASES:
        assert divergence(logits, logits, config).abs().max() <= 1e-6


def taught(workplace: Workplace, **changes: Any) -> dict[str, Any]:
    """Return what makes a recipe of the stage one that learns from `base`."""
    values = {"stage": "distill", "teacher": str(workplace.runs / "base"), "init_from": None}
    return values | changes


def divergences(folder: Path) -> list[float]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [line["loss/kl"] for line in lines if line["kind"] == "train"]


def train(workplace: Workplace, name: str, *arguments: str, **changes: Any) -> Path:
    return workplace.train(name, *arguments, **taught(workplace, **changes))


def test_a_student_comes_closer_to_its_teacher_and_resumes_to_the_same_bits(
    workplace: Workplace,
) -> None:
    fast = {"optimizer": {"eps": 1e-8}}
    whole = train(workplace, "student", **fast)
    found = divergences(whole)
    assert found[-1] < 0.8 * found[0]
    parts = train(workplace, "student-parts", "--stop-at", "2", **fast)
    assert run(["train", str(parts / "recipe.yaml"), "--resume"]) == 0
    assert_same_run(whole, parts)


def test_a_copy_of_the_teacher_has_nothing_to_learn(workplace: Workplace) -> None:
    base = str(workplace.runs / "base")
    folder = train(workplace, "copy", "--stop-at", "1", init_from=base)
    assert abs(divergences(folder)[0]) <= 1e-6


def test_the_block_for_prediction_further_ahead_is_healed_alone(workplace: Workplace) -> None:
    parts = ["embed", "mamba", "attention", "mlp", "router", "experts", "shared", "latent", "head"]
    folder = workplace.train("healed", tune={"freeze": parts})
    base, found = (read_model(workplace.runs / name)[1] for name in ("base", "healed"))
    changed = {name for name in base if not torch.equal(base[name], found[name])}
    assert changed
    assert all(name.startswith("mtp.") for name in changed)
    lines = [x for x in read_metrics(folder / "metrics.jsonl") if x["kind"] == "train"]
    assert lines[-1]["loss/mtp_1"] < lines[0]["loss/mtp_1"] - 0.05


@pytest.mark.distributed
def test_two_ranks_learn_what_one_learns(workplace: Workplace) -> None:
    found = []
    for world in (1, 2):
        name = f"taught-{world}"
        values = workplace.values(
            name, **taught(workplace, schedule={"peak": 1e-3, "total_steps": 2})
        )
        job = Job(DistillConfig.model_validate(values), world=world)
        assert job.wait() == [0] * world, job.text()
        found.append((divergences(job.run), read_model(job.run)[1]))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    for name, tensor in found[0][1].items():
        # float32 gradients summed in another order
        torch.testing.assert_close(found[1][1][name], tensor, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher": "/absent"}, "teacher: /absent: does not exist"),
        ({"model": {"vocab_size": 5000}}, "has a vocabulary of 4096, but model.vocab_size = 5000"),
        ({"distillation": {"top_k": 4096}}, "distillation.top_k = 4096 is not below"),
        ({"parallel": {"cp": 2}}, "parallel.cp = 2 cannot compare distributions"),
    ],
)
def test_a_mistake_is_one_sentence(
    workplace: Workplace, capsys: pytest.CaptureFixture, changes: dict, said: str
) -> None:
    recipe = workplace.recipe("bad-distill", **taught(workplace, **changes))
    capsys.readouterr()
    assert run(["train", str(recipe)]) == 2
    sentence = capsys.readouterr().err.strip()
    assert said in sentence
    assert len(sentence.splitlines()) == 1
    assert not (workplace.runs / "bad-distill" / "checkpoints").exists()


def test_a_teacher_with_another_tokenizer_is_refused(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    exported = tmp_path / "teacher"
    command = ["export", str(workplace.runs / "base"), "--out", str(exported), "--no-check"]
    assert run(command) == 0
    path = exported / "tokenizer.json"
    path.write_text(path.read_text().replace('"</s>"', '"</t>"'))
    recipe = workplace.recipe("other", **taught(workplace, teacher=str(exported)))
    capsys.readouterr()
    assert run(["train", str(recipe)]) == 2
    assert "has another tokenizer than data.tokenizer" in capsys.readouterr().err
