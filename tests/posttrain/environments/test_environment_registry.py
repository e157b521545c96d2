"""Environments by name, and the same rows in every process."""

import json
from pathlib import Path

import pytest

from nemotron.errors import UserError
from nemotron.posttrain.environments.base import ReadsFile, Response, level_problem
from nemotron.posttrain.environments.registry import ENVIRONMENTS, find_environment
from tests.support.verdicts import rows_elsewhere, rows_here

WITHOUT_PACKAGES = [
    "arith_chain",
    "if_constraints",
    "long_context",
    "mcqa",
    "text_to_sql",
    "tool_calc_db",
]


def test_another_process_generates_the_same_rows():
    assert rows_elsewhere(WITHOUT_PACKAGES) == rows_here(WITHOUT_PACKAGES)


@pytest.mark.parametrize("name", WITHOUT_PACKAGES)
def test_the_name_in_the_registry_is_the_environments_own(name: str):
    assert find_environment(name).name == name
    assert name in ENVIRONMENTS


@pytest.mark.parametrize("name", WITHOUT_PACKAGES)
def test_the_highest_level_has_tasks_and_none_is_above_it(name: str):
    options = {"tokens": 4096} if name == "long_context" else {}
    environment = find_environment(name, options)
    for row in environment.rows(2, 1, environment.max_level):
        environment.check(row)
    assert level_problem(environment, environment.max_level) is None
    problem = level_problem(environment, environment.max_level + 0.5)
    assert problem is not None
    assert f"is above {environment.max_level}," in problem


def test_levels_end_where_tasks_do_not_become_harder():
    def options(level: int) -> int:
        [row] = find_environment("mcqa").rows(1, 1, level)
        return len(row["options"])

    assert [options(level) for level in (3, 4, 5)] == [8, 10, 10]


def test_an_unknown_name_is_refused_with_a_near_one():
    with pytest.raises(UserError, match=r"name = arith is unknown; known are|did you mean"):
        find_environment("arith")
    with pytest.raises(UserError, match="did you mean mcqa"):
        find_environment("mcqaa")


@pytest.mark.parametrize("name", WITHOUT_PACKAGES)
def test_every_environment_takes_rows_of_a_file(name: str, tmp_path: Path):
    """Its own rows, written and read again, are checked and judged as those that it generates."""
    made, path = find_environment(name), tmp_path / "rows.jsonl"
    rows = list(made.rows(5, 1, 0))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = find_environment(name, {"data": str(path)})
    assert isinstance(read, ReadsFile)
    again = list(read.rows(5, 2, 0))
    assert again != rows
    assert sorted(map(json.dumps, again)) == sorted(map(json.dumps, rows))
    for row in rows:
        assert read.tools(row) == made.tools(row)
        state = read.seed(row)
        assert state == made.seed(row)
        answer = Response("12")
        assert read.verify(row, answer, state) == made.verify(row, answer, state)
    assert (
        level_problem(read, 1) == f"is a level, but these tasks of {name} have none; leave it out."
    )
    path.write_text(json.dumps(rows[0]) + '\n{"responses_create_params": {"input": "1+1="}}\n')
    with pytest.raises(UserError, match=f"environments: {name}: data = .* line 2: .* is absent"):
        find_environment(name, {"data": str(path)}).contents()
    with pytest.raises(UserError, match="cannot be read: No such file or directory; give a JSONL"):
        find_environment(name, {"data": str(tmp_path / "none")}).contents()
