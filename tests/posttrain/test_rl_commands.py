"""Commands around reinforcement learning: chats, evaluation, verdicts of stored rollouts."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from nemotron.cli import run
from nemotron.posttrain.demonstrations import Demonstrates
from nemotron.posttrain.environments.arith_chain import ArithChain
from nemotron.posttrain.environments.base import Response, messages_of
from nemotron.posttrain.environments.registry import ENVIRONMENTS, find_environment
from tests.support.fine_tuning import write_recipe
from tests.support.tiny_run import MODEL

ABLE = [name for name, kind in ENVIRONMENTS.items() if issubclass(kind, Demonstrates)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and the run of two steps that it makes."""
    folder = tmp_path_factory.mktemp("rl")
    values = {
        "name": "two",
        "stage": "rl",
        "output": str(folder / "runs"),
        "device": "cpu",
        "model": {**MODEL, "num_nextn_predict_layers": 0, "mtp_hybrid_override_pattern": None},
        "data": {"seq_len": 95},
        "rollout": {
            "environments": [{"name": "arith_chain"}],
            "num_prompts_per_step": 2,
            "num_generations_per_prompt": 2,
            "max_new_tokens": 8,
            "evaluation_tasks": 4,
            "reasoning_budget": 3,
            "truncated": "keep",
            "verify_timeout_s": 100.0,  # a busy machine takes its time
        },
        "batch": {"global_tokens": 4 * 95, "micro_batch": 4},
        "schedule": {"kind": "constant", "peak": 1e-3, "total_steps": 2},
    }
    assert run(["train", str(write_recipe(folder / "two.yaml", values))]) == 0
    return folder


@pytest.mark.parametrize("name", ABLE)
@pytest.mark.parametrize("level", [0, 2])
def test_a_demonstrated_answer_earns_the_reward(name: str, level: int) -> None:
    environment = find_environment(name)
    for row in environment.rows(30, 5, level):
        answer = environment.demonstrate(row)
        assert environment.verify(row, answer, None).reward == 1
        assert answer.reasoning


def test_reasoning_about_a_chain_computes_every_operator_once() -> None:
    environment = find_environment("arith_chain")
    for row in environment.rows(30, 5, 3):
        steps = environment.demonstrate(row).reasoning.splitlines()
        assert len(steps) == sum(map(row["question"].count, "+-*"))
        for step in steps:
            terms, value = step.split("=")
            assert eval(terms) == int(value)
        assert steps[-1].endswith(f"={row['expected_answer']}")


def test_chats_are_rows_of_the_environments_and_the_same_again(tmp_path: Path) -> None:
    out = tmp_path / "new" / "chats.jsonl"
    command = ["rl", "chats", "arith_chain", "mcqa@1", "--count", "5", "--out", str(out)]
    assert run(command) == 0
    text = out.read_text()
    found = [json.loads(line)["messages"] for line in text.splitlines()]
    rows = [
        messages_of(row)
        for name, level in (("arith_chain", 0), ("mcqa", 1))
        for row in find_environment(name).rows(5, 1, level)
    ]
    assert sorted(map(str, rows)) == sorted(str(messages[:-1]) for messages in found)
    assert all(messages[-1]["reasoning_content"] for messages in found)
    assert run([*command, "--overwrite"]) == 0
    assert out.read_text() == text
    assert run([*command, "--overwrite", "--no-thinking"]) == 0
    assert "reasoning_content" not in out.read_text()


def test_texts_hold_as_many_mistakes_as_asked(tmp_path: Path) -> None:
    out = tmp_path / "sums.jsonl"
    command = ["rl", "chats", "arith_chain", "--text", "--no-thinking", "--mistakes", "0.75"]
    assert run([*command, "--count", "400", "--out", str(out)]) == 0
    texts = [json.loads(line)["text"].split("=") for line in out.read_text().splitlines()]
    environment = ArithChain()
    rewards = [
        environment.verify({"expected_answer": eval(question)}, Response(answer), None).reward
        for question, answer in texts
    ]
    assert 0.2 < sum(rewards) / 400 < 0.3
    assert {"about", "or so", "?"} <= {word.strip(" -0123456789") for _, word in texts}


def test_a_mistake_earns_no_reward_and_its_reasoning_leads_to_it() -> None:
    environment = ArithChain()
    for number, row in enumerate(environment.rows(30, 5, 1)):
        answer = environment.mistake(row, random.Random(number))
        assert environment.verify(row, answer, None).reward == 0
        [value] = re.findall(r"-?\d+", answer.text)
        assert answer.reasoning.endswith(f"={value}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mcqa", "--mistakes", "0.5"], "mcqa does not make mistakes; choose from arith_chain."),
        (["if_constraints"], "does not answer its own tasks; choose from arith_chain"),
        (["arith_chain@hard"], "write arith_chain@1"),
        (["arith_chain", "mcqa@99"], "'mcqa@99' is above 4, the highest level"),
        (["arith_chian"], "did you mean arith_chain?"),
    ],
)
def test_a_mistake_in_chats_is_one_sentence(tmp_path: Path, capsys, arguments, said: str) -> None:
    assert run(["rl", "chats", *arguments, "--out", str(tmp_path / "chats.jsonl")]) == 2
    assert said in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_chats_replace_no_file_unasked(tmp_path: Path, capsys) -> None:
    out = tmp_path / "mine.jsonl"
    out.write_text("mine")
    assert run(["rl", "chats", "mcqa", "--out", str(out)]) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine"


def test_a_budget_closes_reasoning_and_is_not_learned(folder: Path) -> None:
    """Three tokens, then the closing tag; `</think>` is one token of the tokenizer."""
    [first, *_] = (folder / "runs" / "two" / "rollouts").glob("*.jsonl")
    answers = [json.loads(line) for line in first.read_text().splitlines()]
    closed = [answer for answer in answers if len(answer["tokens"]) > 3]
    assert closed
    for answer in closed:
        assert answer["forced"] == [place == 3 for place in range(len(answer["tokens"]))]


@pytest.mark.slow
def test_evaluation_gives_rewards_by_budget(folder: Path, capsys) -> None:
    out, plot = folder / "out" / "results.json", folder / "out" / "curve.svg"
    command = ["rl", "evaluate", str(folder / "two.yaml"), "--model", str(folder / "runs" / "two")]
    assert run([*command, "--budget", "0", "--budget", "2", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    results = json.loads(out.read_text())["results"]
    assert [result["budget"] for result in results] == [0, 2]
    for line, result in zip(lines, results, strict=True):
        assert result["tasks"] == 4
        assert 0 <= result["reward"] <= 1
        assert f"reward {result['reward']:.3f}" in line
    assert run([*command, "--budget", "0", "--budget", "2", "--plot", str(plot)]) == 0
    drawing = ElementTree.parse(plot).getroot()
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
    assert "arith_chain" in "".join(drawing.itertext())


@pytest.mark.slow
def test_a_run_is_evaluated_itself(folder: Path, capsys) -> None:
    home = folder / "runs" / "two"
    assert run(["rl", "evaluate", str(home), f"init_from={home}/nothing"]) == 0
    named, *rewards = capsys.readouterr().out.splitlines()
    assert named == f"model {home}"
    assert run(["rl", "evaluate", str(folder / "two.yaml"), "--model", str(home)]) == 0
    assert capsys.readouterr().out.splitlines() == rewards


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give --model, or init_from"),
        (["teacher=nowhere", "advantage.clamp=2"], "the teacher gives every token its advantage"),
        (["--model", "nowhere"], "does not exist"),
        (["--model", "RUN", "--plot", "curve.svg"], "give --budget at least twice"),
        (["--model", "RUN", "--budget", "8"], "leave no token of rollout.max_new_tokens = 8"),
    ],
)
def test_a_mistake_in_evaluation_is_one_sentence(folder, capsys, arguments, said: str) -> None:
    given = [str(folder / "runs" / "two") if word == "RUN" else word for word in arguments]
    assert run(["rl", "evaluate", str(folder / "two.yaml"), *given]) == 2
    assert said in capsys.readouterr().err


def test_verdicts_that_changed_are_counted(folder: Path, tmp_path: Path, capsys) -> None:
    home = folder / "runs" / "two"
    assert run(["rl", "reverify", str(home)]) == 0
    assert "8 rollouts  0 changed" in capsys.readouterr().out
    path = sorted((home / "rollouts").glob("*.jsonl"))[-1]
    stored = path.read_text()
    first, *others = stored.splitlines(keepends=True)
    changed = json.loads(first)
    right = changed["verdict"]["reward"]
    changed["verdict"]["reward"] = 0.5
    path.write_text(json.dumps(changed) + "\n" + "".join(others))
    words = ["rl", "reverify", str(home), "--out", str(tmp_path)]
    assert run(words) == 1
    assert "8 rollouts  1 changed" in capsys.readouterr().out
    assert run(words) == 2  # what is there may be the rollouts of another run
    assert "exists already; give a new name" in capsys.readouterr().err
    again = json.loads((tmp_path / path.name).read_text().splitlines()[0])
    assert again["verdict"]["reward"] == right
    stranger = changed | {"task": changed["task"] | {"row": {}}}
    for damaged in (
        b"{}",
        b"[1]",
        b"\x94",
        b"[" * 9999,
        json.dumps(changed | {"logprobs": []}).encode(),
        json.dumps(stranger).encode(),
    ):
        path.write_bytes(first.encode() + damaged)
        assert run(["rl", "reverify", str(home)]) == 2
        assert f"{path}:2: is not a rollout" in capsys.readouterr().err
    path.write_text(stored)


@pytest.mark.slow
def test_a_reference_stays_as_it_was_when_the_run_goes_on(folder: Path) -> None:
    """The decay of weights moves the policy even where no answer has a reward."""
    start = f"init_from={folder / 'runs' / 'two'}"
    given = [start, "policy.kl_coefficient=0.5", "schedule.peak=0.1", "optimizer.weight_decay=0.5"]
    command = ["train", str(folder / "two.yaml"), *given]
    assert run([*command, "name=whole"]) == 0
    assert run([*command, "name=parts", "--stop-at", "1"]) == 75
    assert run(["train", str(folder / "runs" / "parts"), "--resume"]) == 0
    whole, parts = ([*rollouts(folder / "runs" / name)] for name in ("whole", "parts"))
    assert parts == whole
    first, second = whole[:4], whole[4:]
    for answer in first:
        assert answer["reference_logprobs"] == pytest.approx(answer["old_logprobs"], abs=1e-6)
    for answer in second:
        assert answer["reference_logprobs"] != pytest.approx(answer["old_logprobs"], abs=1e-3)
    lines = (folder / "runs" / "whole" / "metrics.jsonl").read_text().splitlines()
    losses = [line["loss/kl"] for line in map(json.loads, lines) if line["kind"] == "train"]
    assert abs(losses[0]) < 1e-6 < losses[1]


@pytest.mark.slow
def test_a_teacher_gives_every_token_its_advantage(folder: Path) -> None:
    teacher = f"teacher={folder / 'runs' / 'two'}"
    command = ["train", str(folder / "two.yaml"), teacher, "schedule.total_steps=1"]
    assert run([*command, "name=other", "seed=5"]) == 0
    assert run([*command, "name=itself", f"init_from={folder / 'runs' / 'two'}"]) == 0
    for name in ("other", "itself"):
        pairs = [
            (old, taught)
            for answer in rollouts(folder / "runs" / name)
            for old, taught, forced in zip(
                answer["old_logprobs"], answer["teacher_logprobs"], answer["forced"], strict=True
            )
            if not forced
        ]
        lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        [line] = [line for line in map(json.loads, lines) if line["kind"] == "train"]
        mean = sum(old - taught for old, taught in pairs) / len(pairs)
        assert line["rl/teacher_kl"] == pytest.approx(mean, abs=1e-9)
        if name == "itself":
            assert max(abs(old - taught) for old, taught in pairs) < 1e-5
        else:
            # the loss at the first update is the divergence of the answers
            assert line["loss/policy"] == pytest.approx(mean, rel=1e-3)
            assert max(abs(old - taught) for old, taught in pairs) > 0.1


def rollouts(run: Path) -> Iterator[dict[str, Any]]:
    for path in sorted((run / "rollouts").glob("*.jsonl")):
        yield from map(json.loads, path.read_text().splitlines())


def test_the_recipe_of_a_run_without_further_prediction_can_be_read_again(folder: Path) -> None:
    """It writes `mtp_detach_heads`, whose usual value here is not that of pre-training."""
    assert run(["train", str(folder / "runs" / "two"), "--resume"]) == 0
