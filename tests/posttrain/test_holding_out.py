"""Tasks that are held out: evaluations ask them, training never does."""

import pytest

from nemotron.errors import UserError
from nemotron.posttrain.config import RlConfig
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
