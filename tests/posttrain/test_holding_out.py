"""Tasks that are held out: evaluations ask them, training never does."""

import json
from pathlib import Path

import pytest

from nemotron.cli import run
from nemotron.errors import UserError
from nemotron.posttrain.config import RlConfig
from nemotron.posttrain.environments.base import Response, build_row, environment_of
from nemotron.posttrain.holding_out import is_held_out
from nemotron.posttrain.tasks import Tasks
from tests.support.rl import rl_values

EVERY = 200
"""Different tasks of level 0."""


def build(fraction: float, **rollout: int) -> Tasks:
    few = {"environments": [{"name": "arith_chain"}], "held_out_fraction": fraction}
    return Tasks(RlConfig.model_validate({"name": "x", **rl_values(rollout={**few, **rollout})}))


def test_training_asks_all_tasks_but_those_of_evaluations() -> None:
    tasks = build(0.25, num_prompts_per_step=500, evaluation_tasks=500)
    trained = {task.prompt for number in range(6) for task in tasks.batch(number)}
    held = {task.prompt for task in tasks.held_out()}
    assert not trained & held
    assert len(trained | held) == EVERY
    assert EVERY / 8 < len(held) < EVERY / 2.5
    # another seed trains on the same ones
    other = Tasks(tasks._config.model_copy(update={"seed": 7}))
    assert not {task.prompt for task in other.batch(0)} & held


def test_without_a_fraction_any_task_may_be_asked() -> None:
    tasks = build(0.0, num_prompts_per_step=3000, evaluation_tasks=3000)
    assert {task.prompt for task in tasks.batch(0)} == {task.prompt for task in tasks.held_out()}


def test_a_fraction_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="held_out_fraction = 1e-09 leaves arith_chain too"):
        build(1e-9).held_out()


def test_one_environment_stands_twice_under_labels() -> None:
    """Each entry has its own options, level and tools, and its answers are judged by itself."""
    entries = [
        {"name": "arith_chain"},
        {"name": "arith_chain", "label": "calculator", "level": 2, "options": {"tools": True}},
    ]
    given = {"environments": entries, "prompt": "chat", "num_prompts_per_step": 20}
    values = rl_values(rollout=given, data={"seq_len": 511}, batch={"global_tokens": 60 * 511})
    tasks = Tasks(RlConfig.model_validate({"name": "x", **values}))
    batch = tasks.batch(0)
    assert {task.environment for task in batch} == {"arith_chain", "calculator"}
    for task in batch:
        assert environment_of(task.row) == task.environment
        has_tools = bool(task.row["responses_create_params"].get("tools"))
        assert has_tools == (task.environment == "calculator")
    rows = [task.row for task in batch]
    with tasks.verifiers() as verifiers:
        begun = verifiers.begin(rows, 100.0)
        answers = [Response(row["expected_answer"]) for row in rows]
        judged = verifiers.verify(rows, answers, [each.state for each in begun], 100.0)
    assert [each.has_tools for each in begun] == [t.environment == "calculator" for t in batch]
    assert [verdict.reward for verdict in judged] == [1.0] * 20


def test_conversations_leave_held_out_tasks_to_evaluations(tmp_path: Path) -> None:
    out = tmp_path / "chats.jsonl"
    words = ["rl", "chats", "arith_chain", "arith_chain@2+tools", "--count", "400"]
    assert run([*words, "--held-out", "0.25", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 800
    asked = [build_row("arith_chain", row["messages"][0]["content"]) for row in rows]
    assert not any(is_held_out(row, 0.25) for row in asked)
    for question, call, said, answer in (r["messages"] for r in rows if "tools" in r):
        assert call["reasoning_content"] == question["content"].rstrip("=")
        assert answer["reasoning_content"] == answer["content"] == said["content"]
