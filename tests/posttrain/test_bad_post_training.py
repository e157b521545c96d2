"""What may be wrong after pre-training: one sentence each, and nothing is begun or scored."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemotron.cli import run
from nemotron.posttrain.environments.base import Response, build_row
from nemotron.posttrain.environments.registry import find_environment
from nemotron.posttrain.environments.remote import HttpEnv
from nemotron.posttrain.environments.wire import read_verdict
from tests.support.conversations import QUESTION, TOOLS
from tests.support.fine_tuning import Workplace, write_rows
from tests.support.fine_tuning import write_recipe as write_sft
from tests.support.listening import Answer, listening, saying, silent
from tests.support.rl import rl_values, write_recipe

CHAIN = build_row("arith_chain", "3+4=", expected_answer="7")
BAD_CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{"}}],
}


def rows(workplace: Workplace, given: list[dict[str, Any]], **changes: Any) -> Path:
    path = write_rows(workplace.folder / "bad.jsonl", given)
    data = {"sources": [{"name": "own", "path": str(path)}]}
    return workplace.recipe("bad", data=data, **changes)


def rl(workplace: Workplace, **rollout: Any) -> Path:
    return write_recipe(workplace.folder, "bad", rl_values(rollout=rollout))


def gym(workplace: Workplace, row: dict[str, Any], name: str) -> Path:
    path = write_rows(workplace.folder / "rows.jsonl", [row])
    return rl(workplace, environments=[{"name": name, "options": {"data": str(path)}}])


def adapted(workplace: Workplace) -> Path:
    values = workplace.values("bad", tune={"adapter": {"targets": ["mlp"]}})
    model = {key: value for key, value in values["model"].items() if key != "intermediate_size"}
    model["hybrid_override_pattern"] = model["hybrid_override_pattern"].replace("-", "M")
    return write_sft(workplace.folder / "bad.yaml", {**values, "model": model})


PIVOT = {"responses_create_params": {"input": "Q", "tools": TOOLS}}
TO_BAD_CALL = {"type": "function_call", "name": "f", "arguments": "{"}
RECIPES: dict[str, tuple[Callable[[Workplace], Path], str]] = {
    "an empty group": (lambda w: rl(w, num_generations_per_prompt=0), "must be greater than 1"),
    "an environment that is unknown": (
        lambda w: rl(w, environments=[{"name": "arith_chian"}]),
        "did you mean arith_chain?",
    ),
    "a level that no task has": (
        lambda w: rl(w, environments=[{"name": "mcqa", "level": 5}]),
        "environments: mcqa: level = 5.0 is above 4, the highest level",
    ),
    "a level of a file": (
        lambda w: rl(w, environments=[{"name": "pivot", "level": 1, "options": {"data": "x"}}]),
        "environments: pivot: level = 1.0 is a level, but these tasks of pivot have none",
    ),
    "a suite whose level no task has": (
        lambda w: write_recipe(
            w.folder,
            "bad",
            rl_values(evaluation={"suites": {"names": ["json_schema@0", "mcqa@99"]}}),
        ),
        "evaluation.suites.names = mcqa@99 is above 4, the highest level",
    ),
    "a row without verifier fields": (
        lambda w: gym(w, PIVOT, "pivot"),
        "expected_action is absent",
    ),
    "malformed arguments that are expected": (
        lambda w: gym(w, {**PIVOT, "expected_action": TO_BAD_CALL}, "pivot"),
        "expected_action is neither a call nor a message",
    ),
    "malformed arguments that are learned": (
        lambda w: rows(w, [{"messages": [QUESTION, BAD_CALL], "tools": TOOLS}]),
        "the arguments of f are not a JSON object",
    ),
    "no turn of an assistant": (
        lambda w: rows(w, [{"messages": [QUESTION]}]),
        "messages has no assistant message",
    ),
    "a target of adapters without a match": (adapted, "tune.adapter.targets"),
    "a teacher with another vocabulary": (
        lambda w: w.recipe(
            "bad",
            stage="distill",
            init_from=None,
            teacher=str(w.runs / "base"),
            model={"vocab_size": 5000},
        ),
        "has a vocabulary of 4096, but model.vocab_size = 5000",
    ),
    "a reference that is absent": (
        lambda w: rows(
            w,
            [{"prompt": "Q", "chosen": "A", "rejected": "B"}] * 9,
            stage="dpo",
            reference="/absent",
        ),
        "reference: /absent: does not exist",
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_refused_in_one_sentence(
    workplace: Workplace, capsys: pytest.CaptureFixture, name: str
) -> None:
    make, said = RECIPES[name]
    recipe = make(workplace)
    capsys.readouterr()
    assert run(["train", str(recipe)]) == 2
    sentence = capsys.readouterr().err.strip()
    assert said in sentence
    assert len(sentence.splitlines()) == 1
    assert not (workplace.runs / "bad" / "checkpoints").exists()


SERVERS: dict[str, tuple[Answer, str]] = {
    "slow": (silent, "took longer than 0.4 s"),
    "failing": (saying("lost", "500 Oops"), "answered with status 500: lost"),
    "lying about the form": (saying("fine"), "what is not JSON"),
    "lying about the reward": (saying('{"reward": NaN}'), "gave reward = nan"),
}


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_that_fails_masks_the_sample(name: str) -> None:
    answer, said = SERVERS[name]
    with listening(answer) as url:
        remote = HttpEnv("theirs", url, timeout_s=0.4)
        verdict = remote.verify(CHAIN, Response("7"), {"cookies": {}, "error": None})
    assert verdict.mask
    assert said in str(verdict.error)


def test_a_server_that_is_down_masks_the_sample() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    state = HttpEnv("theirs", url, timeout_s=5).seed(CHAIN)
    assert "Connection refused" in state["error"]


@pytest.mark.parametrize("reward", ["NaN", "Infinity", '"1"', "null", "true"])
def test_a_reward_that_is_no_number_masks_the_sample(reward: str) -> None:
    verdict = read_verdict(json.loads(f'{{"reward": {reward}}}'))
    assert verdict.mask
    assert "is not a finite number" in str(verdict.error)


def test_malformed_arguments_of_an_answer_are_wrong_and_no_fault() -> None:
    environment = find_environment("pivot")
    row = {**PIVOT, "expected_action": {**TO_BAD_CALL, "arguments": "{}"}}
    verdict = environment.verify(row, Response("", output=(TO_BAD_CALL,)), None)
    assert (verdict.reward, verdict.error, verdict.mask) == (0.0, None, False)
