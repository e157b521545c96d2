"""Runs that learn from pairs of answers: what they learn, layouts, resuming, mistakes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron.checkpoint.read import read_model
from nemotron.cli import run
from nemotron.posttrain.preference.config import DpoConfig
from nemotron.run.metrics import read_metrics
from tests.support.cases import further
from tests.support.conversations import ANSWER, QUESTION
from tests.support.fine_tuning import Workplace, write_recipe, write_rows
from tests.support.job import Job
from tests.support.preferences import pairs
from tests.support.same_run import assert_same_run


def preferring(workplace: Workplace, **changes: Any) -> dict[str, Any]:
    """Return what makes a recipe of the stage one that learns from pairs."""
    path = workplace.folder / "pairs.jsonl"
    if not path.exists():
        write_rows(path, pairs())
    data = {"sources": [{"name": "pairs", "path": str(path)}], "seq_len": 480}
    values: dict[str, Any] = {
        "stage": "dpo",
        "data": data | changes.pop("data", {}),
        "batch": {"global_tokens": 4 * 480, "micro_batch": 2},
        "evaluation": {"tokens": 4 * 480},
        "dpo": {"reference_policy_kl_penalty": 0.5},
        "optimizer": {"eps": 1e-8},
        "schedule": {"peak": 2e-3},
    }
    return values | changes


def lines_of(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == kind]


def test_a_run_prefers_the_chosen_answers_and_resumes_to_the_same_bits(
    workplace: Workplace,
) -> None:
    whole = workplace.train("dpo", **preferring(workplace))
    found = lines_of(whole)
    # the policy is the reference at first
    assert abs(found[0]["dpo/rewards_chosen"]) + abs(found[0]["dpo/rewards_rejected"]) <= 1e-6
    assert found[0]["loss/main"] == pytest.approx(0.693147, abs=1e-6)
    assert found[-1]["loss/main"] < found[0]["loss/main"] - 0.1
    assert found[-1]["dpo/accuracy"] > 0.9
    margin = found[-1]["dpo/rewards_chosen"] - found[-1]["dpo/rewards_rejected"]
    assert found[-1]["dpo/rewards_margin"] == pytest.approx(margin, abs=1e-5)
    [held_out] = lines_of(whole, "validation")
    assert held_out["validation/pairs/accuracy"] == held_out["validation/accuracy"] > 0.9
    assert held_out["validation/loss"] < 0.6
    parts = workplace.train("dpo-parts", "--stop-at", "2", **preferring(workplace))
    for entry in (workplace.folder / "cache").glob("reference-*"):
        (entry / "logprobs.npy").unlink()  # a damaged entry is computed again, the same
    assert run(["train", str(parts / "recipe.yaml"), "--resume"]) == 0
    assert_same_run(whole, parts)


@pytest.fixture(scope="module")
def plain_base(workplace: Workplace) -> Path:
    """A run like `base` without the block for prediction further ahead, which pipelines need."""
    values = workplace.values(
        "plain",
        stage="pretrain",
        init_from=None,
        data={"sources": [{"name": "docs"}], "seq_len": 64},
        batch={"global_tokens": 512, "micro_batch": 4},
        schedule={"total_steps": 2},
        evaluation={"tokens": 64},
    )
    values["model"] = without_ahead(values["model"])
    assert run(["train", str(write_recipe(workplace.folder / "plain.yaml", values))]) == 0
    return workplace.runs / "plain"


def without_ahead(model: dict[str, Any]) -> dict[str, Any]:
    absent = ("num_nextn_predict_layers", "mtp_hybrid_override_pattern")
    even = {"n_routed_experts": 6}  # for two ranks that share them
    return {key: value for key, value in model.items() if key not in absent} | even


def in_layout(
    workplace: Workplace,
    base: Path,
    name: str,
    parallel: dict[str, int],
    peak: float = 1e-3,
    **more: Any,
) -> DpoConfig:
    """Return a run of two steps, which has the reference score the pairs for itself."""
    changes = preferring(
        workplace,
        init_from=str(base),
        dpo={"reference_policy_kl_penalty": 0.5, "sft_loss_weight": 0.1},
        loss={"moe_aux_loss_coeff": 0.01},
        optimizer={"eps": 1e-2},
        schedule={"peak": peak, "total_steps": 2},
        parallel=parallel,
        data={"cache": str(workplace.folder / f"cache-{name}")},
        **more,
    )
    values = workplace.values(name, **changes)
    return DpoConfig.model_validate(values | {"model": without_ahead(values["model"])})


Found = tuple[list[dict[str, Any]], dict[str, Any], dict[str, torch.Tensor]]


def learned(job: Job, world: int) -> Found:
    assert job.wait(400) == [0] * world, job.text()
    [held_out] = lines_of(job.run, "validation")
    return lines_of(job.run), held_out, read_model(job.run)[1]


NEAR = {"rel": 3e-7, "abs": 2e-6}
"""Numbers that are added up in another order; the loss on answers is 65, where float32 has 8e-6."""


@pytest.fixture(scope="module")
def alone(workplace: Workplace, plain_base: Path) -> Found:
    """What one process learns."""
    return learned(Job(in_layout(workplace, plain_base, "dpo-alone", {}), world=1), 1)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "parallel",
    [
        {},
        *map(further, ({"cp": 2}, {"tp": 2}, {"ep": 2}, {"dp_replicate": 2})),
        {"pp": 2},
    ],
    ids=str,
)
def test_two_ranks_learn_what_one_learns(
    workplace: Workplace, plain_base: Path, alone: Found, parallel: dict
) -> None:
    name = f"dpo-two-{''.join(parallel)}"
    found = learned(Job(in_layout(workplace, plain_base, name, parallel)), 2)
    for one, two in zip(alone[0], found[0], strict=True):
        # at first the policy is the reference, so that rounding decides which reward is higher
        keys = [k for k in one if k.startswith(("loss/", "dpo/rewards"))]
        for key in (*keys, *(["dpo/accuracy"] if one["step"] > 1 else [])):
            assert two[key] == pytest.approx(one[key], **NEAR), key
    for key in (key for key in alone[1] if key.startswith("validation/")):
        assert found[1][key] == pytest.approx(alone[1][key], **NEAR), key
    for name, tensor in alone[2].items():
        # float32 gradients summed in another order
        torch.testing.assert_close(found[2][name], tensor, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_learn_the_adapters_that_one_learns(
    workplace: Workplace, plain_base: Path
) -> None:
    tune = {"adapter": {"kind": "lora", "rank": 3, "alpha": 6}}
    one, two = (
        learned(Job(in_layout(workplace, plain_base, f"lora-{n}", {}, 0.1, tune=tune), world=n), n)
        for n in (1, 2)
    )
    for alone, shared in zip(one[0], two[0], strict=True):
        for key in (k for k in alone if k.startswith(("loss/", "dpo/rewards"))):
            assert shared[key] == pytest.approx(alone[key], **NEAR), key
    before = read_model(plain_base)[1]
    changes = {name: (tensor - before[name]).abs().max() for name, tensor in one[2].items()}
    changed = {name for name, change in changes.items() if change}
    assert changed < before.keys()  # norms, the embedding and the like stay
    assert max(changes.values()) > 1e-3  # more than what the comparison allows
    for name, tensor in one[2].items():
        # float32 gradients summed in another order
        torch.testing.assert_close(two[2][name], tensor, rtol=1e-4, atol=1e-6, msg=name)


MISTAKES = {
    "no reference": ({"reference": "/absent"}, "reference: /absent: does not exist"),
    "nothing to begin with": ({"init_from": None}, "init_from is absent"),
    "initial weights gone": ({"init_from": "/absent"}, "init_from: /absent: does not exist"),
    "a cut pair": (
        {"data": {"packing": {"kind": "best_fit", "long_documents": "truncate"}}},
        "data.packing.long_documents = truncate would cut a pair of answers",
    ),
    "answers that see each other": (
        {"data": {"reset_documents": False}},
        "data.reset_documents = false must be true",
    ),
    "one answer": ({"rows": [{"prompt": "Q", "chosen": "A"}]}, "has no column rejected"),
    "no prompt": (
        {"rows": [{"chosen": "A", "rejected": "B"}]},
        "the prompt is absent, and chosen and rejected are not whole conversations",
    ),
    "two forms": (
        {"rows": [{"prompt": "Q", "chosen": "A", "rejected": [QUESTION, ANSWER]}]},
        "one of chosen and rejected is a whole conversation",
    ),
    "only ties": (
        {"rows": [{"prompt": "Q", "chosen": "A", "rejected": "A"}] * 2},
        "there is no document to train on (rows 2, unsupervised 2)",
    ),
    "conversations": ({"chats": True}, "has no column chosen"),
    "no pair fits": ({"seq_len": 16}, "data.packing drops all"),
    "inert weight": (
        {"dpo": {"sft_average_log_probs": True}},
        "has no effect because dpo.sft_loss_weight = 0",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture, name: str
) -> None:
    changes, said = MISTAKES[name]
    changes = dict(changes)
    if rows := changes.pop("rows", None):
        path = write_rows(tmp_path / "rows.jsonl", rows)
        changes["data"] = {"sources": [{"name": "own", "path": str(path)}]}
    if changes.pop("chats", False):
        changes["data"] = {"sources": [{"name": "own", "path": str(workplace.chats)}]}
    if length := changes.pop("seq_len", None):
        changes |= {"data": {"seq_len": length}, "batch": {"global_tokens": 4 * length}}
    recipe = workplace.recipe("bad-dpo", **preferring(workplace, **changes))
    capsys.readouterr()
    assert run(["train", str(recipe)]) == 2
    sentence = capsys.readouterr().err.strip()
    assert said in sentence
    assert len(sentence.splitlines()) == 1
    assert not (workplace.runs / "bad-dpo" / "checkpoints").exists()
