"""Environments by name, and the same rows in every process."""

import pytest

from nemotron.errors import UserError
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


def test_an_unknown_name_is_refused_with_a_near_one():
    with pytest.raises(UserError, match=r"name = arith is unknown; known are|did you mean"):
        find_environment("arith")
    with pytest.raises(UserError, match="did you mean mcqa"):
        find_environment("mcqaa")
