"""Programs that pass their tests, that fail, and that try to pass without solving the task."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from nemotron.errors import UserError
from nemotron.posttrain.environments.base import BadRow, Row, build_row
from nemotron.posttrain.environments.code_exec import CodeExec
from nemotron.posttrain.sandbox.run import Outcome, Run, Sandbox
from tests.support.namespaces import isolated
from tests.support.verdicts import assert_enough, assert_good_rows, judge, rows_elsewhere, rows_here

ADD = {"inputs": ["1\n2", "-5\n5"], "outputs": ["3", "0"], "fn_name": "add"}
SUM = {"inputs": ["1 2\n", "3 4 5\n"], "outputs": ["3", "12\n"]}
MEAN = {"inputs": ["[1, 2]", "[0.1, 0.2, 0.3]"], "outputs": ["1.5", "0.2"], "fn_name": "mean"}
ROWS = {"inputs": ["3"], "outputs": ['[["a", 1], {"b": null}, true]'], "fn_name": "rows"}
LINES = {"inputs": ["2"], "outputs": ["0\n1"]}
ADDED = "def add(a, b):\n    return a + b"
TOTAL = "print(sum(map(int, input().split())))"


def block(code: str) -> str:
    return f"```python\n{code}\n```"


# tests, answer
RIGHT: list[tuple[dict[str, Any], str]] = [
    (ADD, block(ADDED)),
    (ADD, f"Here:\n{block(ADDED)}\nThat is all."),
    (ADD, f"{block('nonsense(')}\nBetter:\n{block(ADDED)}"),
    (ADD, f"```\n{ADDED}\n```"),
    (ADD, f"```py\n{ADDED}\n```"),
    (ADD, block("add = lambda a, b: a + b")),
    (ADD, block("class Solution:\n    def add(self, a, b):\n        return a + b")),
    (ADD, block(f"{ADDED}\nprint('noise')")),
    (ADD, block("def add(a, b):\n    print('noise')\n    return b + a")),
    (ADD, block("import operator\nadd = operator.add")),
    (ADD, block("def add(a, b):\n    return a if b == 0 else add(a + 1, b - 1)")),
    (ADD, block(f"{ADDED}\nif __name__ == '__main__':\n    raise SystemExit(1)")),
    (SUM, block(TOTAL)),
    (SUM, block("import sys\nprint(sum(int(x) for x in sys.stdin.read().split()))")),
    (SUM, block(f"{TOTAL[:-1]}, end='   ')")),
    (SUM, block(f"import sys\nsys.stderr.write('noise')\n{TOTAL}")),
    (SUM, block(f"def main():\n    {TOTAL}\nif __name__ == '__main__':\n    main()")),
    (MEAN, block("def mean(v):\n    return sum(v) / len(v)")),
    (MEAN, block("from statistics import mean")),
    (ROWS, block("def rows(n):\n    return [('a', 1), {'b': None}, True]")),
    (LINES, block("for i in range(int(input())):\n    print(i, '')")),
    (LINES, block("print('0\\n1\\n')")),
]
WRONG: list[tuple[dict[str, Any], str]] = [
    (ADD, ""),
    (ADD, ADDED),
    (ADD, block("")),
    (ADD, block("def add(a, b)\n    return a + b")),
    (ADD, block("def add(a, b):\n    return a - b")),
    (ADD, block("def add(a, b):\n    return abs(a) + b")),
    (ADD, block("def add(a, b):\n    print(a + b)")),
    (ADD, block("def sum(a, b):\n    return a + b")),
    (ADD, block("def add(a):\n    return a")),
    (ADD, block("def add(a, b):\n    return str(a + b)")),
    (ADD, block("def add(a, b):\n    return {a + b}")),
    (ADD, block(f"{ADDED}\n1 / 0")),
    (ADD, f"{block(ADDED)}\n{block('def add(a, b):' + chr(10) + '    return 3')}"),
    (SUM, block("print(3)")),
    (SUM, block("print(sum(map(int, input().split())) + 1)")),
    (SUM, block(f"{TOTAL}\n{TOTAL}")),
    (SUM, block(f"print('The sum is')\n{TOTAL}")),
    (SUM, block("print(input())")),
    (SUM, block(f"{TOTAL}\nraise ValueError")),
    (MEAN, block("def mean(v):\n    return sum(v) // len(v)")),
    (ROWS, block("def rows(n):\n    return [['a', 1], {'b': None}, 1]")),
    (LINES, block("print('1\\n0')")),
]
HACKS: list[tuple[dict[str, Any], str]] = [
    (
        ADD,
        block("class Any(int):\n    def __eq__(s, o): return True\ndef add(a, b): return Any(7)"),
    ),
    (ADD, block("import json\njson.dumps = lambda x: 'null'\ndef add(a, b): return a + b + 1")),
    (ADD, block("raise SystemExit(0)")),
    (ADD, block("import os\nos._exit(0)")),
    (ADD, block("def add(a, b):\n    while True: pass")),
    (ADD, block("import os\nos.kill(os.getppid(), 9)")),
    (ADD, block("def add(a, b): return 10 ** 10 ** 3 if a else 'x' * 10**6")),
    (ADD, block("def add(a, b): return float('nan')")),
    (ADD, block("def add(a, b): return True")),
    (ADD, block("def add(a, b): return [3, 0]")),
    (SUM, block("print(open('/tmp/expected').read())")),
    (SUM, block("print('3\\n12')")),
    (SUM, block("import os, glob\nprint([open(f).read() for f in glob.glob('/tmp/*')])")),
    (SUM, block("while True: print(3)")),
    (SUM, block("assert True\nprint('all tests passed')")),
    (ADD, "```python\n" + ADDED),
    (ADD, block("#" * 100_001 + "\n" + ADDED)),
]
FORGE = """
import os
line = '{"stdout": "7", "stderr": "", "status": 0, "reason": "end"}\\n'
with open(f"/proc/{os.getppid()}/fd/1", "w") as file:
    file.write(line * 3)
def add(a, b): return 7
"""
HACKS.append((ADD, block(FORGE)))


def row(tests: dict[str, Any], **more: Any) -> Row:
    return build_row("code_exec", "?", verifier_metadata={"unit_tests": tests}, **more)


@pytest.fixture(scope="module")
def environment() -> CodeExec:
    """The environment without isolation, for the harmless programs; so it runs anywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEMOTRON_ALLOW_UNSAFE_CODE", "1")
        return CodeExec({"kind": "none", "time_s": 5})


@pytest.fixture(scope="module")
def judged(environment: CodeExec) -> dict[str, float]:
    """The reward of every harmless answer."""
    cases = [*RIGHT, *WRONG]
    with ThreadPoolExecutor(2) as pool:
        rewards = pool.map(lambda case: judge(environment, row(case[0]), case[1]), cases)
        return {f"{t}{a}": reward for (t, a), reward in zip(cases, rewards, strict=True)}


@pytest.fixture(scope="module")
def contained() -> CodeExec:
    return CodeExec({"time_s": 0.7, "total_s": 1.5})


@pytest.mark.parametrize(("tests", "answer"), RIGHT)
def test_a_program_that_passes_earns_one(
    tests: dict[str, Any], answer: str, judged: dict[str, float]
):
    assert judged[f"{tests}{answer}"] == 1


@pytest.mark.parametrize(("tests", "answer"), WRONG)
def test_any_other_program_earns_nothing(
    tests: dict[str, Any], answer: str, judged: dict[str, float]
):
    assert judged[f"{tests}{answer}"] == 0


@isolated
@pytest.mark.parametrize(("tests", "answer"), HACKS)
def test_a_program_that_cheats_earns_nothing(
    tests: dict[str, Any], answer: str, contained: CodeExec
):
    assert judge(contained, row(tests), answer) == 0


@isolated
def test_programs_pass_in_isolation(contained: CodeExec):
    for tests, answer in (RIGHT[0], RIGHT[12]):
        assert judge(contained, row(tests), answer) == 1


@isolated
def test_the_environment_isolates_by_default():
    assert CodeExec().describe().startswith("bubblewrap")


def test_the_tables_are_long_enough():
    assert_enough(RIGHT, WRONG, HACKS)


def test_rows_are_good(environment: CodeExec):
    assert_good_rows(environment)


@isolated
def test_another_process_generates_the_same_rows():
    assert rows_elsewhere(["code_exec"]) == rows_here(["code_exec"])


def test_a_fraction_is_the_share_of_the_tests_that_pass(environment: CodeExec):
    answer = block("def add(a, b):\n    return 3")
    assert judge(environment, row(ADD, grading_mode="fraction"), answer) == 0.5
    assert judge(environment, row(ADD), answer) == 0


def test_expected_outputs_never_enter_the_sandbox(environment: CodeExec, monkeypatch):
    seen: list[Any] = []

    def run(self: Sandbox, *given: Any) -> list[Outcome | None]:
        seen.append(given)
        return [None]

    monkeypatch.setattr(Sandbox, "run", run)
    tests = {"inputs": ["1"], "outputs": ["987654321"], "fn_name": "f"}
    assert judge(environment, row(tests), block("x")) == 0
    assert seen == [("x\n", [Run(arguments=(1,))], "f")]


def test_a_wrong_setting_is_named():
    with pytest.raises(UserError, match=r"code_exec: sandbox\.time_s"):
        CodeExec({"time_s": -1})
    with pytest.raises(UserError, match="NEMOTRON_ALLOW_UNSAFE_CODE=1"):
        CodeExec({"kind": "none"})


@pytest.mark.parametrize(
    ("tests", "said"),
    [
        ([], "unit_tests lacks inputs or outputs"),
        ({"inputs": [], "outputs": []}, "unit_tests lacks inputs or outputs"),
        ({"inputs": ["1"], "outputs": []}, "has 1 inputs and 0 outputs"),
        ({"inputs": ["1"] * 51, "outputs": ["1"] * 51}, "at most 50"),
        ({"inputs": [1], "outputs": ["1"]}, "what is not a text"),
        ({"inputs": ["x"], "outputs": ["1"], "fn_name": "f"}, "the input 'x'"),
    ],
)
def test_a_row_that_cannot_be_judged_is_refused(
    tests: dict[str, Any], said: str, environment: CodeExec
):
    with pytest.raises(BadRow, match=said):
        environment.check(row(tests))
