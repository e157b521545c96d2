"""Environments by name, and the same rows in every process."""

import pytest

from nemotron.errors import UserError
from nemotron.posttrain.environments.base import level_problem
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
