"""Pivots of trajectories: which turns become rows, and which of them a trained model keeps."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nemotron.cli import run
from nemotron.posttrain.environments.base import messages_of
from nemotron.posttrain.environments.pivot import Pivot, expected_calls
from nemotron.posttrain.pivots import turns_of
from tests.support.conversations import GARDEN, GARDEN_TOOLS, call
from tests.support.fine_tuning import Workplace, write_rows

TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {"type": "object", "properties": {"k": {"type": "string"}}},
    },
}


def test_each_turn_with_calls_becomes_a_row_with_what_came_before() -> None:
    found = list(turns_of({"messages": GARDEN, "tools": GARDEN_TOOLS}))
    assert [len(expected_calls(row)) for row in found] == [2, 1]
    for row in found:
        Pivot().check(row)
    first, second = map(messages_of, found)
    assert [message["role"] for message in first] == ["system", "user", "assistant", "user"]
    assert [message["role"] for message in second[4:]] == [
        *("assistant", "tool", "tool", "assistant", "user"),
    ]
    assert len(second[4]["tool_calls"]) == 2
    unlearned = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in GARDEN]
    assert list(turns_of({"messages": unlearned, "tools": GARDEN_TOOLS})) == []


def trajectory(question: str, value: str) -> dict[str, Any]:
    asked = {"role": "user", "content": question}
    acted = {"role": "assistant", "content": None, "tool_calls": [call({"k": value})]}
    return {"messages": [asked, acted], "tools": [TOOL]}


@pytest.mark.slow
@pytest.mark.nightly
def test_a_model_keeps_the_turns_at_which_it_is_sometimes_right(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    # to one question it learns two answers; what is asked for at the other it never does
    chats = [trajectory("A", "a" if n % 2 else "b") for n in range(8)]
    chats += [trajectory("B", "b") for _ in range(8)]
    data = {
        "sources": [{"name": "calls", "path": str(write_rows(tmp_path / "c.jsonl", chats))}],
        "seq_len": 400,
        "validation_fraction": 0.0,
        "chat": {"enable_thinking": False},
    }
    changes = {
        "data": data,
        "batch": {"global_tokens": 4 * 400},
        "optimizer": {"eps": 1e-8},
        "schedule": {"peak": 1e-2, "total_steps": 60},
    }
    learned = workplace.train("calls", **changes)
    out = tmp_path / "pivots.jsonl"
    values = {
        "stage": "rl",
        "init_from": str(learned),
        "data": {"seq_len": 400},
        "rollout": {
            "environments": [{"name": "pivot", "options": {"data": str(out)}}],
            "enable_thinking": False,
            "num_prompts_per_step": 2,
            "num_generations_per_prompt": 2,
            "max_new_tokens": 64,
        },
        "batch": {"global_tokens": 4 * 400, "micro_batch": 2},
    }
    recipe = workplace.folder / "pivot.yaml"
    made = {
        **workplace.common("pivot"),
        **values,
        "schedule": {"kind": "constant", "peak": 1e-3, "total_steps": 1},
    }
    recipe.write_text(json.dumps({**made, "schedule": {**made["schedule"], "kind": "constant"}}))
    few = write_rows(tmp_path / "few.jsonl", [chats[0], chats[1], trajectory("B", "quartz")])
    command = ["rl", "pivots", str(recipe), str(few), "--out", str(out), "--samples", "16"]
    capsys.readouterr()
    assert run(command) == 0
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    questions = Counter(messages_of(row)[0]["content"] for row in rows)
    assert questions == {"A": 2}, said
    assert "2 pivots of 3 turns; left out: 1 that are always right" in said
    for row in rows:
        assert 0 < row["pivot"]["mean"] < 1
        assert len(row["pivot"]["rewards"]) == 16
    assert len(list(Pivot(str(out)).rows(2, 1, 0))) == 2
    assert run(command) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert run([*command, "--overwrite", "--max-reward", "0"]) == 2
    assert "has no pivots (0 pivots of 3 turns" in capsys.readouterr().err
    assert len(out.read_text().splitlines()) == 2  # nothing was lost
