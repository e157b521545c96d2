"""`code_exec`: write a program, which runs in a sandbox against tests."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from nemotron.errors import UserError
from nemotron.posttrain.environments.base import (
    BadRow,
    Response,
    Row,
    Verdict,
    WithoutTools,
    build_row,
    find_field,
    optional_field,
    random_of,
    whole_level,
)
from nemotron.posttrain.environments.code_tasks import make_task
from nemotron.posttrain.sandbox.config import SandboxConfig
from nemotron.posttrain.sandbox.run import Outcome, Run, Sandbox

FENCE = re.compile(r"```(?:python3?|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
MAX_TESTS = 50
MAX_CODE = 100_000
TESTS = 8
"""Tests of a generated task."""
MODES = ("binary", "fraction")


class CodeExec(WithoutTools):
    """Write Python whose outputs are those of `unit_tests`, in the form of LiveCodeBench.

    With `fn_name`, each line of an input is one argument as JSON, and outputs are compared as
    values; else each is a standard input, and outputs are compared without
    blanks at the ends of lines. Expected outputs never enter the sandbox. The last block of code
    counts. `grading_mode` fraction rewards the share of the tests that pass. A sandbox that does
    not start is a fault of the verifier.

    Raises:
        UserError: when this machine has no sandbox, or a setting of it is wrong.
    """

    name = "code_exec"
    max_level = 100
    """Steps of the function; more would only make long texts."""

    def __init__(self, sandbox: Mapping[str, Any] | None = None) -> None:
        """`sandbox` has the settings of `SandboxConfig`."""
        try:
            self._sandbox = Sandbox(
                SandboxConfig.model_validate({} if sandbox is None else sandbox)
            )
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, ("sandbox", *first["loc"])))
            rule = first["msg"].replace("Input should", "must")
            raise UserError(f"{rule}.", key=place, where="environments: code_exec") from None

    def describe(self) -> str:
        """Return one line that says what isolates the programs."""
        return self._sandbox.describe()

    def rows(self, count: int, seed: int, level: float) -> Iterator[Row]:
        """Yield tasks; each depends on `seed`, `level` and its number alone."""
        for number in range(count):
            rng = random_of(self.name, seed, level, number)
            task = make_task(rng, whole_level(rng, level), TESTS)
            prompt = (
                "Write a Python function `solve(numbers)`. For a list of whole numbers: "
                f"{task.text}\nFor example, solve({task.inputs[1][0]}) is {task.outputs[1]}.\n"
                "Answer with one block of code."
            )
            tests = {
                "inputs": ["\n".join(map(json.dumps, arguments)) for arguments in task.inputs],
                "outputs": [json.dumps(output) for output in task.outputs],
                "fn_name": "solve",
            }
            yield build_row(self.name, prompt, verifier_metadata={"unit_tests": tests})

    def check(self, row: Row) -> None:
        """Check the tests.

        Raises:
            BadRow: when they are absent, too many, or malformed.
        """
        tests = find_field(row, "unit_tests")
        inputs, outputs = (
            (tests.get("inputs"), tests.get("outputs")) if isinstance(tests, dict) else (None, None)
        )
        if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs:
            raise BadRow("unit_tests lacks inputs or outputs; give two lists of the same length")
        if len(inputs) != len(outputs) or len(inputs) > MAX_TESTS:
            raise BadRow(
                f"unit_tests has {len(inputs)} inputs and {len(outputs)} outputs; "
                f"give as many of both, at most {MAX_TESTS}"
            )
        if not all(isinstance(text, str) for text in (*inputs, *outputs)):
            raise BadRow("unit_tests contains what is not a text; write values as JSON")
        if tests.get("fn_name"):
            for text in inputs:
                read_arguments(text)
        mode = optional_field(row, "grading_mode", MODES[0])
        if mode not in MODES:
            raise BadRow(f"grading_mode = {mode!r} is unknown; give binary or fraction")

    def verify(self, row: Row, response: Response, state: Any) -> Verdict:
        """Reward 1 if all tests pass, or their share."""
        code, tests = extract(response.text), find_field(row, "unit_tests")
        if code is None:
            return Verdict(0.0)
        name = tests.get("fn_name")
        runs = [
            Run(arguments=tuple(read_arguments(text))) if name else Run(stdin=text)
            for text in tests["inputs"]
        ]
        outcomes = self._sandbox.run(code, runs, name)
        passed = [
            _passes(outcome, wanted, bool(name))
            for outcome, wanted in zip(outcomes, tests["outputs"], strict=True)
        ]
        share = sum(passed) / len(passed)
        is_binary = optional_field(row, "grading_mode", MODES[0]) == "binary"
        return Verdict(float(share == 1) if is_binary else share, {"passed": share}, extracted=code)


def extract(text: str) -> str | None:
    """Return the last block of code, None without one or with one that is very long."""
    blocks = FENCE.findall(text)
    return blocks[-1] if blocks and len(blocks[-1]) <= MAX_CODE else None


def read_arguments(text: str) -> list[Any]:
    """Return the arguments of a call, of which each line is one as JSON.

    Raises:
        BadRow: when a line is not JSON.
    """
    try:
        return [json.loads(line) for line in text.strip().split("\n")]
    except ValueError:
        raise BadRow(f"unit_tests has the input {text[:60]!r}, which is not JSON") from None


def _passes(outcome: Outcome | None, wanted: str, is_value: bool) -> bool:
    if outcome is None or outcome.reason != "end" or outcome.status != 0:
        return False
    if not is_value:
        return _lines(outcome.stdout) == _lines(wanted)
    try:
        found, expected = json.loads(outcome.stdout), json.loads(wanted)
    except (ValueError, RecursionError):
        return False
    return _are_equal(found, expected)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _are_equal(found: Any, wanted: Any) -> bool:
    """Compare JSON values; true is not 1, and real numbers may differ in the last digits."""
    if isinstance(found, bool) or isinstance(wanted, bool):
        return found is wanted
    if isinstance(found, int | float) and isinstance(wanted, int | float):
        if isinstance(found, int) and isinstance(wanted, int):
            return found == wanted
        return abs(found - wanted) <= 1e-9 * max(1.0, abs(wanted))
    if isinstance(found, list) and isinstance(wanted, list):
        pairs = zip(found, wanted, strict=False)
        return len(found) == len(wanted) and all(_are_equal(a, b) for a, b in pairs)
    if isinstance(found, dict) and isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(_are_equal(found[k], wanted[k]) for k in found)
    return type(found) is type(wanted) and bool(found == wanted)
