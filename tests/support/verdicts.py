"""Judges tables of answers, and checks what holds for every environment's generator."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from nemotron.posttrain.environments.base import Environment, Response, Row, messages_of
from nemotron.posttrain.environments.registry import find_environment

LEVELS = (0, 1.5, 4)


def judge(environment: Environment, row: Row, answer: str | Response) -> float:
    """Return the reward of an answer that the verifier judged without a fault."""
    environment.check(row)
    response = answer if isinstance(answer, Response) else Response(answer)
    verdict = environment.verify(row, response, environment.seed(row))
    assert verdict.error is None
    assert not verdict.mask
    return verdict.reward


def assert_enough(right: list[Any], wrong: list[Any], hacks: list[Any]) -> None:
    """The sizes of the tables that every environment has."""
    assert len(right) >= 20
    assert len(wrong) >= 20
    assert len(hacks) >= 10


def assert_good_rows(environment: Environment, count: int = 12) -> None:
    """Rows are JSON, pass their own check, differ, and do not depend on how many are asked for."""
    for level in LEVELS:
        rows = list(environment.rows(count, 3, level))
        assert len(rows) == count
        assert json.loads(json.dumps(rows)) == rows
        for row in rows:
            environment.check(row)
            assert messages_of(row)[-1]["content"]
            assert row["agent_ref"]["name"] == environment.name
        assert list(environment.rows(5, 3, level)) == rows[:5]
        assert list(environment.rows(5, 4, level)) != rows[:5]
        assert len({json.dumps(row) for row in rows}) > count // 2


def rows_here(names: list[str]) -> list[list[Row]]:
    """Return a few rows of each environment and level."""
    return [list(find_environment(name).rows(4, 5, level)) for name in names for level in LEVELS]


def rows_elsewhere(names: list[str]) -> list[list[Row]]:
    """Return the same from another process, whose sets have another order."""
    code = "import json; from tests.support.verdicts import rows_here; "
    command = [sys.executable, "-c", f"{code}print(json.dumps(rows_here({names!r})))"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=root)
    return json.loads(done.stdout)


def calls(*made: tuple[str, Any], text: str = "Done.") -> Response:
    """Return a response that called these tools; arguments are a dictionary or raw text."""
    items: list[dict[str, Any]] = []
    for number, (name, arguments) in enumerate(made):
        raw = arguments if isinstance(arguments, str) else json.dumps(arguments)
        identifier = f"call_{number}"
        call = {"type": "function_call", "name": name, "arguments": raw, "call_id": identifier}
        answer = {"type": "function_call_output", "call_id": identifier, "output": "…"}
        items += [call, answer]
    part = {"type": "output_text", "text": text}
    message = {"type": "message", "role": "assistant", "content": [part]}
    return Response(text, output=(*items, message))
