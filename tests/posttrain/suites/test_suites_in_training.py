"""Suites of tasks while a model is trained: in other stages and layouts, with and after a stop."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron.cli import run
from nemotron.evaluate.model import Asking, Evaluated
from nemotron.evaluate.suites import Plan, run_suites
from nemotron.posttrain.suites.suites import SuiteSettings
from nemotron.recipe.load import load_recipe
from nemotron.session import Session
from tests.support.cases import further
from tests.support.fine_tuning import Workplace, write_recipe
from tests.support.job import Job

NAMES = ["arith_chain", "mcqa_likelihood@1"]
SUITES = {"names": NAMES, "every_steps": 2, "tasks": 5, "max_new_tokens": 6, "slots": 4}


def recipe(workplace: Workplace, name: str, suites: dict[str, Any], **changes: Any) -> Path:
    """Write a pre-training recipe of four steps."""
    values = {
        **workplace.common(name),
        "data": {"seq_len": 64, "cache": str(workplace.folder / "cache")},
        "batch": {"global_tokens": 512, "micro_batch": 4},
        # SGD-like: AdamW's first steps make a whole step of any rounding of a gradient
        "optimizer": {"eps": 1e-2},
        "schedule": {"kind": "constant", "peak": 1e-2, "total_steps": 4},
        "evaluation": {"tokens": 64, **({"suites": suites} if suites else {})},
        **changes,
    }
    return write_recipe(workplace.folder / f"{name}.yaml", values)


def train(workplace: Workplace, name: str, suites: dict[str, Any], **changes: Any) -> Path:
    assert run(["train", str(recipe(workplace, name, suites, **changes))]) == 0
    return workplace.runs / name


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def answers(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: line[key] for key in ("task", "number", "row", "response")} for line in found]


@pytest.fixture(scope="module")
def whole(workplace: Workplace) -> Path:
    return train(workplace, "whole", SUITES)


def test_training_is_the_same_to_the_bit_and_metrics_are_those_of_the_answers(
    workplace: Workplace, whole: Path
):
    without = train(workplace, "without", {})
    assert not (without / "suites").exists()
    assert not records(without, "suites")
    losses = [[line["loss/main"] for line in records(r, "train")] for r in (without, whole)]
    assert losses[0] == losses[1]
    found = records(whole, "suites")
    assert [record["step"] for record in found] == [2, 4]
    for record in found:
        path = whole / "suites" / f"step-{record['step']:08}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(lines) == 10
        for name in NAMES:
            key = name if "@" in name else f"{name}@0"
            own = [line["verdict"]["reward"] for line in lines if line["task"] == key]
            reward = record[f"suites/{key.replace('@', '-')}/reward"]
            assert reward == pytest.approx(sum(own) / 5)


def test_stored_answers_are_judged_again(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(["rl", "reverify", str(whole)]) == 0
    said = capsys.readouterr().out
    assert "arith_chain@0    10 answers  0 changed  0 faults" in said
    assert "mcqa_likelihood@1 has no verifier" in said
    copied = tmp_path / "run" / "suites"
    copied.mkdir(parents=True)
    [file, *_] = sorted((whole / "suites").iterdir())
    first, *others = file.read_text().splitlines(keepends=True)
    changed = json.loads(first)
    right = changed["verdict"]["reward"]
    changed["verdict"]["reward"] = 0.5
    (copied / file.name).write_text(json.dumps(changed) + "\n" + "".join(others))
    words = ["rl", "reverify", str(tmp_path / "run"), "--out", str(tmp_path / "again")]
    assert run(words) == 1
    assert "5 answers  1 changed" in capsys.readouterr().out
    assert (tmp_path / "again" / file.name).read_text() == file.read_text()
    assert right != 0.5
    assert run(words) == 2  # what is there may be the answers of another run
    assert "exists already; give a new name" in capsys.readouterr().err
    for damaged in ("{}", "[1]", json.dumps(changed | {"row": {}})):
        (copied / file.name).write_text(first + damaged)
        assert run(words[:3]) == 2
        assert f"{copied / file.name}:2: is not an answer" in capsys.readouterr().err
    assert run([*words[:3], "--out", str(copied)]) == 2
    assert "choose another folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_session_answers_as_the_run_does(workplace: Workplace, whole: Path):
    session = Session(workplace.folder / "whole.yaml")
    before = sorted(whole.rglob("*"))
    for _ in session.steps():
        pass
    found = session.evaluate()
    assert sorted(whole.rglob("*")) == before
    [*_, last] = records(whole, "suites")
    wanted = {key: value for key, value in last.items() if key.startswith("suites/")}
    assert wanted
    assert {key: found[key] for key in wanted} == wanted
    assert found["validation/loss"] == records(whole, "validation")[-1]["validation/loss"]


@pytest.mark.slow
def test_a_run_that_was_stopped_gives_the_same_answers(workplace: Workplace, whole: Path):
    path = recipe(workplace, "parts", SUITES)
    assert run(["train", str(path), "--stop-at", "3"]) == 75
    assert run(["train", str(path), "--resume"]) == 0
    for name in ("step-00000002.jsonl", "step-00000004.jsonl"):
        parts = workplace.runs / "parts" / "suites" / name
        assert parts.read_bytes() == (whole / "suites" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", further("adapters")])
def test_the_finished_model_gives_the_answers_of_the_last_step(
    workplace: Workplace, whole: Path, tmp_path: Path, kind: str
):
    """Also where adapters are trained, which checkpoints merge."""
    asked = ["--tasks", "5", "--max-new-tokens", "6", "--batch", "4", "--seed", "1234"]
    if kind == "adapters":
        chat = {"prompt": "text", **SUITES}
        tune = {"adapter": {"rank": 3, "targets": ["in_proj", "q_proj"]}}
        evaluation = {"tokens": 644, "suites": chat}
        folder = workplace.train("adapters", tune=tune, evaluation=evaluation)
        asked += ["--prompt", "text"]
    else:
        folder = whole
    words = [word for name in NAMES for word in ("--suite", name)]
    out = tmp_path / "out"
    assert run(["evaluate", str(folder), *words, *asked, "--device", "cpu", "--out", str(out)]) == 0
    assert answers(out / "samples.jsonl") == answers(folder / "suites" / "step-00000004.jsonl")


@pytest.mark.slow
def test_quantized_layers_are_answered_for_by_their_weights(workplace: Workplace):
    precision = {"compute": "bf16", "preset": "mxfp8"}
    folder = train(workplace, "quantized", SUITES, precision=precision)
    loaded = Evaluated.load(folder, "cpu", Asking())
    loaded.model.compute_dtype = torch.bfloat16
    plan = Plan(tuple(NAMES), SuiteSettings(tasks=5, seed=1234), max_new_tokens=6, slots=4)
    found = [json.loads(sample.as_line()) for sample in run_suites(loaded, plan, None).samples]
    stored = answers(folder / "suites" / "step-00000004.jsonl")
    assert [line["response"] for line in found] == [line["response"] for line in stored]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "parallel", [{"dp_shard": 2}, further({"tp": 2}), further({"pp": 2})], ids=str
)
def test_two_ranks_give_the_answers_of_one(
    workplace: Workplace, whole: Path, parallel: dict[str, int]
):
    name = f"two-{'-'.join(parallel)}"
    path = recipe(workplace, name, SUITES, parallel=parallel)
    job = Job(load_recipe(path).config)
    assert job.wait() == [0, 0], job.text()
    first = "step-00000002.jsonl"
    assert answers(job.run / "suites" / first) == answers(whole / "suites" / first)


@pytest.mark.parametrize(
    ("suites", "said"),
    [
        ({"names": ["arithmetik"]}, "evaluation.suites.names = arithmetik is unknown; did you"),
        ({"names": ["ruler"]}, "is for finished models"),
        ({"names": ["tools"]}, "need the chat format"),
        ({"names": ["arithmetic"], "samples": 2}, "raise the temperature"),
        ({"tasks": 5}, "evaluation.suites.names is empty"),
    ],
)
def test_a_mistake_is_one_sentence(
    workplace: Workplace, capsys: pytest.CaptureFixture[str], suites: dict[str, Any], said: str
):
    path = recipe(workplace, "wrong", suites)
    assert run(["train", str(path)]) == 2
    [sentence] = capsys.readouterr().err.strip().splitlines()
    assert said in sentence
    assert not (workplace.runs / "wrong").exists()
