"""Verifiers in processes: verdicts as in this process, and what happens when they fail."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemotron.posttrain import workers as module
from nemotron.posttrain.environments.base import BadRow, Response, Row, build_row
from nemotron.posttrain.environments.registry import find_environment
from nemotron.posttrain.environments.wire import read_verdict
from nemotron.posttrain.verify import Verifiers
from tests.support.namespaces import isolated
from tests.support.verdicts import calls

LIMIT_S = 20.0
"""Far above what any verifier needs here."""


@pytest.fixture(scope="module")
def verifiers() -> Iterator[Verifiers]:
    with Verifiers(2) as made:
        yield made


def chain(expected: str = "7") -> Row:
    return build_row("arith_chain", "3+4=", expected_answer=expected)


def judge(verifiers: Verifiers, row: Row, text: str, timeout_s: float = LIMIT_S):
    [verdict] = verifiers.verify([row], [Response(text)], [None], timeout_s)
    return verdict


def test_verdicts_are_those_of_this_process_in_the_order_of_the_rows(verifiers: Verifiers):
    names = ["arith_chain", "mcqa", "if_constraints", "tool_calc_db"]
    rows = [row for name in names for row in find_environment(name).rows(6, 1, 2)]
    rows = rows[::2] + rows[1::2]
    responses, states, expected = [], [], []
    for place, row in enumerate(rows):
        environment = find_environment(row["agent_ref"]["name"])
        made = [(call["name"], call["arguments"]) for call in row.get("ground_truth", [])]
        answer = f"\\boxed{{{row.get('expected_answer', '')}}}" if place % 3 else "no"
        responses.append(calls(*made, text=answer))
        states.append(environment.seed(row))
        expected.append(environment.verify(row, responses[-1], states[-1]))
    assert verifiers.verify(rows, responses, states, LIMIT_S) == expected
    assert len({verdict.reward for verdict in expected}) > 1
    assert not verifiers.faults.total()


def test_text_of_any_kind_reaches_the_verifier(verifiers: Verifiers):
    for text in ("\u2028\\boxed{7}", "\r\n\\boxed{7}\x00", "\ud800\\boxed{7}", "é中\U0001f600 7"):
        assert judge(verifiers, chain(), text) == find_environment("arith_chain").verify(
            chain(), Response(text), None
        )
    assert judge(verifiers, chain(), "x" * 3_000_000 + "\\boxed{7}").reward == 1


def hanging() -> tuple[Row, str]:
    """Return a row whose pattern takes exponential time on an answer."""
    pytest.importorskip("jsonschema", reason="the package jsonschema is not installed")
    schema = json.dumps({"type": "string", "pattern": "^(a+)+$"})
    return build_row("json_schema", "?", schema_str=schema), json.dumps("a" * 64 + "!")


def test_a_verifier_that_hangs_is_killed_and_its_sample_masked():
    row, text = hanging()
    with Verifiers(1) as verifiers:
        verdict = judge(verifiers, row, text, 1.0)
        assert verdict.error == "the verifier took longer than 1 s"
        assert verdict.mask
        assert verifiers.faults == {"json_schema": 1}
        # the pool goes on with another process
        assert judge(verifiers, chain(), "7").reward == 1
        assert verifiers.faults.total() == 1


def test_time_to_load_an_environment_is_not_that_of_a_verdict(monkeypatch: pytest.MonkeyPatch):
    answer = json.dumps({"reward": 1.0})
    slow = f"""
import sys, time
for number, line in enumerate(sys.stdin):
    time.sleep(3 * (number == 0))
    print('"loaded"', flush=True) if number == 0 else time.sleep(60)
    print({answer!r}, flush=True)
"""
    monkeypatch.setattr(module, "module_command", lambda _: [sys.executable, "-c", slow])
    with Verifiers(1) as verifiers:
        assert judge(verifiers, chain(), "7", 2.0) == read_verdict(json.loads(answer))
        assert judge(verifiers, chain(), "7", 0.3).error == "the verifier took longer than 0.3 s"
        monkeypatch.setattr(module, "START_S", 0.2)
        assert judge(verifiers, chain(), "7", 0.3).error == "the verifier took longer than 0.5 s"


def test_a_verifier_that_raises_masks_its_sample_and_no_other(verifiers: Verifiers):
    before = verifiers.faults["arith_chain"]
    rows = [chain()] * 24  # three at once for each process
    rows[1], rows[2] = build_row("arith_chain", "?"), chain("8")
    verdicts = verifiers.verify(rows, [Response("7")] * 24, [None] * 24, LIMIT_S)
    assert [verdict.reward for verdict in verdicts] == [1, 0, 0] + [1] * 21
    assert [verdict.mask for verdict in verdicts] == [False, True] + [False] * 22
    assert "BadRow: expected_answer is absent" in str(verdicts[1].error)
    assert verifiers.faults["arith_chain"] == before + 1


def test_a_killed_process_is_a_fault_that_names_its_status():
    others = children()
    with Verifiers(1) as verifiers:
        judge(verifiers, chain(), "7")
        [worker] = set(children()) - set(others)
        row, text = hanging()
        threading.Timer(0.5, os.kill, (worker, signal.SIGKILL)).start()
        assert judge(verifiers, row, text).error == "the verifier ended: with status -9"
        assert judge(verifiers, chain(), "7").reward == 1


@pytest.mark.slow
def test_a_process_that_ended_between_two_jobs_is_replaced():
    others = children()
    with Verifiers(1) as verifiers:
        judge(verifiers, chain(), "7")
        [worker] = set(children()) - set(others)
        os.kill(worker, signal.SIGKILL)
        time.sleep(0.2)
        verdict = judge(verifiers, chain(), "7")
        assert verdict.reward == 1
        assert verdict.error is None


def test_no_process_outlives_the_pool():
    others = children()
    with Verifiers(2) as verifiers:
        verifiers.verify([chain()] * 8, [Response("7")] * 8, [None] * 8, LIMIT_S)
        started = set(children()) - set(others)
        assert started
    assert not [child for child in started if Path(f"/proc/{child}").exists()]


def test_a_worker_that_hangs_ends_even_if_nobody_is_left_to_kill_it():
    row, text = hanging()
    code = f"""
from nemotron.posttrain.environments.base import Response
from nemotron.posttrain.verify import Verifiers
Verifiers(1).verify([{row!r}], [Response({text!r})], [None], 1.2)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    worker = until(lambda: next(iter(children(parent.pid)), None))
    time.sleep(0.7)  # in the middle of the job
    parent.kill()
    parent.wait()
    assert until(lambda: not Path(f"/proc/{worker}").exists())


def until(condition: Any, limit_s: float = 120.0) -> Any:
    end = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def children(parent: int | None = None) -> list[int]:
    """Return the processes that a process started."""
    parent = parent or os.getpid()
    tasks = Path(f"/proc/{parent}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


@pytest.mark.parametrize(
    "found",
    [
        {"reward": float("nan")},
        {"reward": float("inf")},
        {"reward": None},
        {"reward": "1"},
        {"reward": True},
        {},
        [],
        None,
        {"reward": 1.0, "components": {"a": "b"}},
    ],
)
def test_a_reward_that_is_not_a_finite_number_is_a_fault(found: Any):
    verdict = read_verdict(found)
    assert verdict.mask
    assert verdict.error


def test_a_row_without_an_environment_is_refused(verifiers: Verifiers):
    with pytest.raises(BadRow, match=r"agent_ref\.name is absent"):
        judge(verifiers, {"expected_answer": "7"}, "7")


@isolated
def test_a_program_in_the_sandbox_ends_with_its_verifier():
    code = "import time\ntime.sleep(500)  # of-a-killed-verifier"
    tests = {"inputs": [""], "outputs": [""]}
    row = build_row("code_exec", "?", unit_tests=tests)
    options = {"code_exec": {"sandbox": {"time_s": 60, "total_s": 60}}}
    with Verifiers(1, options) as verifiers:
        started = build_row("code_exec", "?", unit_tests={"inputs": ["7"], "outputs": ["7"]})
        assert judge(verifiers, started, "```\nprint(input())\n```").reward == 1
        others = set(sandboxes())
        seen: set[str] = set()
        threading.Timer(1.0, lambda: seen.update(sandboxes())).start()
        verdict = judge(verifiers, row, f"```python\n{code}\n```", 1.5)
        assert seen - others
        assert "took longer than 1.5 s" in str(verdict.error)
        assert until(lambda: not set(sandboxes()) - others)


def sandboxes() -> list[str]:
    """Return the processes that are, or run in, a sandbox."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0].endswith(b"bwrap") or b"solution.py" in words:
            found.append(path.parent.name)
    return found
