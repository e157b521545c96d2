"""Rollouts with tools through the real command: forced calls, free answers, real tools."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemotron.cli import run
from nemotron.data.tokenizer import load_tokenizer
from nemotron.generate.request import Request
from nemotron.posttrain.answering import Answerer, Asked
from nemotron.posttrain.replay import Experts
from nemotron.posttrain.verify import Called, ToolCalls, Verifiers
from tests.support.rl import rl_values, write_recipe

TOKENIZER = load_tokenizer("embedded")
CALL = (
    "</think>\n<tool_call>\n<function=calculate>\n<parameter=expression>\n6*7\n</parameter>\n"
    "</function>\n</tool_call>\n<|im_end|>"
)
REPLY = "\n<|im_start|>user\n<tool_response>\n42\n</tool_response>\n<|im_end|>\n"


@pytest.fixture
def calls_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Force a call as the first answer of each conversation; the model goes on as it likes."""
    real = Answerer._request
    heard = TOKENIZER.id("<tool_response>")

    def request(self: Answerer, asked: Asked) -> Request:
        found = real(self, asked)
        if heard not in asked.prompt:
            call = tuple(TOKENIZER.encode(CALL, specials=True))
            object.__setattr__(found, "forced", call)
        return found

    monkeypatch.setattr(Answerer, "_request", request)


def recipe(folder: Path, **rollout: Any) -> Path:
    updates = rollout.get("updates_per_step", 1)
    given = {
        "environments": [{"name": "arith_chain", "label": "sums", "options": {"tools": True}}],
        "prompt": "chat",
        "num_prompts_per_step": 2,
        "num_generations_per_prompt": 2,
        "max_new_tokens": 60,
        "max_turns": 2,
        "verify_timeout_s": 100.0,  # a busy machine takes its time
        "evaluation_tasks": 2,
        **rollout,
    }
    values = rl_values(
        rollout=given,
        data={"seq_len": 767},
        batch={"global_tokens": 4 // updates * 767},
        schedule={"total_steps": 2 * updates},
    )
    return write_recipe(folder, "tools", values)


@pytest.mark.slow
@pytest.mark.usefixtures("calls_once")
def test_a_conversation_is_stored_scored_and_judged_as_a_whole(tmp_path: Path, capsys) -> None:
    path = recipe(tmp_path)
    assert run(["train", str(path)]) == 0
    folder = tmp_path / "runs" / "tools"
    text = (folder / "rollouts" / "step-00000001.jsonl").read_text()
    answers = [json.loads(line) for line in text.splitlines()]
    assert len(answers) == 4
    form = Experts(layers=1, top_k=2, num_experts=5)
    call, reply = (TOKENIZER.encode(part, specials=True) for part in (CALL, REPLY))
    for answer in answers:
        assert (answer["turns"], answer["tool_calls"], answer["tool_fault"]) == (2, 1, None)
        tokens, forced = answer["tokens"], answer["forced"]
        assert tokens[: len(call)] == call
        assert tokens[len(call) : len(call) + len(reply)] == reply
        own = forced.index(False)
        # the turn of the model begins after the prompt that the chat format gives
        assert TOKENIZER.decode(tokens[len(call) + len(reply) : own]).startswith("<|im_start|>")
        assert all(forced[:own])
        assert not any(forced[own:])
        assert answer["logprobs"][own:] == pytest.approx(answer["old_logprobs"][own:], abs=1e-4)
        assert len(form.decode(answer["experts"])) == len(answer["task"]["prompt"]) + own - 1 + len(
            tokens[own:]
        )
        kinds = [item["type"] for item in answer["response"]["output"]]
        assert kinds[:2] == ["function_call", "function_call_output"]
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    for line in (line for line in lines if line["kind"] == "train"):
        assert line["rl/turns"] == 2
        assert line["rl/tool_faults"] == line["rl/verifier_faults"] == 0
        assert line["rl/token_mult_prob_error"] < 1 + 1e-4
    assert run(["rl", "reverify", str(folder)]) == 0
    assert "8 rollouts  0 changed  0 faults" in capsys.readouterr().out
    assert run(["rl", "evaluate", str(path), "--model", str(folder)]) == 0
    assert "sums" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("calls_once")
def test_conversations_go_on_with_new_weights_and_after_a_stop(tmp_path: Path) -> None:
    """A stop lies in the middle of the call; what follows what the tool said has newer weights."""
    flying = {"lag": 1, "in_flight_weight_updates": True, "tokens_per_weight_update": 20}
    path = recipe(tmp_path, **flying, updates_per_step=2)
    folder, stored = tmp_path / "runs" / "tools", "rollouts/step-00000002.jsonl"
    assert run(["train", str(path)]) == 0
    whole = (folder / stored).read_text()
    shutil.rmtree(folder)
    assert run(["train", str(path), "--stop-at", "1"]) == 75
    state = json.loads((folder / "checkpoints" / "step-00000001" / "state.json").read_text())
    call = len(TOKENIZER.encode(CALL, specials=True))
    for answer in state["data"]["ahead"]["paused"]:
        assert 0 < len(answer["begun"]["tokens"]) < call
    assert run(["train", str(folder / "recipe.yaml"), "--resume"]) == 0
    assert (folder / stored).read_text() == whole
    for answer in map(json.loads, whole.splitlines()):
        assert answer["turns"] == 2
        assert answer["versions"][0] == [0, 0]
        assert [version for _, version in answer["versions"]] == [0, 1, 2]
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    [line] = [line for line in lines if line["kind"] == "train" and line["step"] == 3]
    assert line["rl/token_mult_prob_error_current"] < 1 + 1e-4


@pytest.mark.slow
@pytest.mark.usefixtures("calls_once")
def test_tools_that_fail_are_counted_and_never_scored(tmp_path: Path, monkeypatch, capsys) -> None:
    """The environment is asked to run a call without a name, at which its process ends."""

    def call(self: Verifiers, calls: list[ToolCalls], timeout_s: float) -> list[Called]:
        return real(self, [replace(each, calls=[{}]) for each in calls], timeout_s)

    real = Verifiers.call
    monkeypatch.setattr(Verifiers, "call", call)
    assert run(["train", str(recipe(tmp_path)), "--stop-at", "1"]) == 75
    folder = tmp_path / "runs" / "tools"
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    [line] = [line for line in lines if line["kind"] == "train"]
    assert line["rl/tool_faults"] == line["rl/verifier_faults"] == line["rl/masked"] == 4
    assert line["skipped_steps"] == 1
    stored = (folder / "rollouts" / "step-00000000.jsonl").read_text().splitlines()
    for answer in map(json.loads, stored):
        assert "a tool ended: KeyError" in answer["tool_fault"]
        assert answer["verdict"]["mask"]
    assert run(["rl", "reverify", str(folder)]) == 0
    assert "4 rollouts  0 changed  4 faults" in capsys.readouterr().out
