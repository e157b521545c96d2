"""Supervised fine-tuning through the real command, from chat files to a model that goes on."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nemotron.checkpoint.read import read_model
from nemotron.cli import run
from nemotron.data.batch import NO_LABEL, Batch
from nemotron.parallel.runtime import Ranks
from nemotron.posttrain.sft_config import SftConfig
from nemotron.run.metrics import read_metrics
from nemotron.train.pretraining import build_trainer, open_data
from nemotron.train.schedule import plan_training
from tests.support.cases import further
from tests.support.fine_tuning import Workplace
from tests.support.same_run import assert_same_run
from tests.support.tiny_run import PEAK_FLOPS


def lines(folder: Path, kind: str = "train") -> list[dict]:
    return [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == kind]


def batch_of(workplace: Workplace, name: str, **changes) -> Batch:
    """Return the rows of the first step of such a recipe."""
    config = SftConfig.model_validate(workplace.values(name, **changes))
    plan = plan_training(config)
    trainer = build_trainer(
        config, plan, open_data(config, plan), torch.device("cpu"), PEAK_FLOPS, Ranks()
    )
    return trainer.batches.take(0)


def test_a_run_learns_the_answers_and_prepares_its_files_once(workplace: Workplace) -> None:
    folder = workplace.train("plain")
    losses = [line["loss/main"] for line in lines(folder)]
    assert losses[-1] < losses[0] - 0.1
    assert "validation/chats/loss" in lines(folder, "validation")[-1]
    assert list(folder.rglob("chat_template.jinja"))
    cached = sorted((workplace.folder / "cache").glob("chat-chats-*"))
    assert len(cached) == 1
    stamp = cached[0].stat().st_mtime_ns
    workplace.train("again")
    assert cached[0].stat().st_mtime_ns == stamp
    assert_same_run(folder, workplace.runs / "again")


def test_changed_conversations_are_prepared_anew_and_not_resumed_with(
    workplace: Workplace, capsys: pytest.CaptureFixture
) -> None:
    own = workplace.folder / "own.jsonl"
    shutil.copy(workplace.chats, own)
    source = {"sources": [{"name": "own", "path": str(own)}]}
    folder = workplace.train("changed", "--stop-at", "2", data=source)
    text = own.read_text()
    own.write_text(text.replace("What is 7", "How much is 7"))
    assert run(["train", str(folder / "recipe.yaml"), "--resume"]) == 2
    assert "differs from the data that the checkpoint was trained on" in capsys.readouterr().err
    own.write_text(text)
    assert run(["train", str(folder / "recipe.yaml"), "--resume"]) == 0


@pytest.mark.parametrize("objective", ["tokens", further("samples")])
def test_the_loss_is_that_of_transformers_on_the_exported_model(
    workplace: Workplace, objective: str
) -> None:
    pytest.importorskip("transformers", reason="the extra `hf` is not installed")
    from nemotron.hf.selfcheck import load_with_transformers

    exported = workplace.folder / "exported"
    if not exported.exists():
        assert run(["export", str(workplace.runs / "base"), "--out", str(exported)]) == 0
    changes = {"init_from": str(exported), "data": {"objective": objective}}
    [first, *_] = lines(workplace.train(f"theirs-{objective}", "--stop-at", "1", **changes))
    batch = batch_of(workplace, "theirs", **changes)
    model, _ = load_with_transformers(
        exported, SftConfig.model_validate(workplace.values("theirs")).model
    )
    total = count = 0.0
    for ids, labels, numbers in zip(batch.input_ids, batch.labels, batch.seq_idx, strict=True):
        for number in numbers.unique():
            own = numbers == number
            if not (labels[own] != NO_LABEL).any():
                continue
            with torch.no_grad():
                logits = model(input_ids=ids[own].unsqueeze(0)).logits[0].float()
            losses = F.cross_entropy(logits, labels[own], ignore_index=NO_LABEL, reduction="sum")
            size = int((labels[own] != NO_LABEL).sum())
            total += losses.item() / (size if objective == "samples" else 1)
            count += 1 if objective == "samples" else size
    assert abs(first["loss/main"] - total / count) <= 1e-5


def test_only_the_assistants_tokens_have_labels(workplace: Workplace) -> None:
    from nemotron.data.tokenizer import load_tokenizer

    tokenizer, batch = load_tokenizer("embedded"), batch_of(workplace, "labels")
    learned = tokenizer.decode(batch.labels[batch.labels != NO_LABEL].tolist())
    assert "It is" in learned
    assert "What is" not in learned
    assert "user" not in learned


@pytest.mark.parametrize("stop", ["1", further("3")])
def test_a_stopped_run_goes_on_to_the_same_bits(workplace: Workplace, stop: str) -> None:
    whole = workplace.train(f"whole{stop}")
    parts = workplace.train(f"parts{stop}", f"stop.every_steps={stop}")
    stopped = json.loads((parts / "status.json").read_text())
    assert (stopped["step"], stopped["reason"]) == (int(stop), f"stop.every_steps = {stop}")
    assert run(["train", str(parts / "recipe.yaml"), "--resume", "stop.every_steps=99"]) == 0
    assert_same_run(whole, parts)


def test_a_run_begins_from_a_run_a_checkpoint_and_an_exported_folder(workplace: Workplace) -> None:
    base = workplace.runs / "base"
    exported = workplace.folder / "plain"
    command = ["export", str(base), "--out", str(exported), "--no-check"]
    assert run(command) == 0
    [checkpoint] = (base / "checkpoints").glob("step-*")
    found = []
    for number, path in enumerate((base, checkpoint, exported)):
        folder = workplace.train(f"from{number}", "--stop-at", "1", init_from=str(path))
        found.append(lines(folder)[0]["loss/main"])
    assert found[0] == found[1]
    # an export rounds most matrices to bfloat16
    assert found[2] == pytest.approx(found[0], abs=1e-2)
    assert found[0] < math.log(4096) - 0.1  # fresh weights know nothing


def test_prediction_further_ahead_is_trained_jointly_detached_or_not_at_all(
    workplace: Workplace,
) -> None:
    base = read_model(workplace.runs / "base")[1]
    ways = {
        "joint": {},
        "detached": {"mtp_detach_heads": True},
        "off": {"mtp_num_depths": 0},
    }
    plain = {"eps": 1e-2, "clip": None}  # the norm that is clipped is that of all gradients
    found = {
        name: read_model(workplace.train(f"mtp-{name}", loss=loss, optimizer=plain))[1]
        for name, loss in ways.items()
    }
    block = [name for name in base if name.startswith("mtp.")]
    bias = [name for name in base if name.endswith("e_score_correction_bias")]
    for name in block:
        assert torch.equal(found["off"][name], base[name]), name
        assert name in bias or not torch.equal(found["joint"][name], base[name]), name
    trunk = [name for name in base if name not in block]
    assert all(torch.equal(found["off"][name], found["detached"][name]) for name in trunk)
    assert not all(torch.equal(found["off"][name], found["joint"][name]) for name in trunk)


def test_frozen_parts_stay_as_they_are(workplace: Workplace) -> None:
    base = read_model(workplace.runs / "base")[1]
    folder = workplace.train("frozen", tune={"freeze": ["embed", "router", "mamba"]})
    found = read_model(folder)[1]
    same = {name for name in base if torch.equal(found[name], base[name])}
    assert {"backbone.embeddings.weight", "backbone.layers.0.mixer.in_proj.weight"} <= same
    gate = "backbone.layers.1.mixer.gate"
    assert {f"{gate}.weight", f"{gate}.e_score_correction_bias"} <= same
    others = {
        "lm_head.weight",
        "backbone.layers.1.mixer.experts.up_proj",
        "mtp.layers.0.eh_proj.weight",
    }
    assert not others & same
