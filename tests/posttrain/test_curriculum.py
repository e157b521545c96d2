"""Curriculum: levels that rise with the pass rate, and tasks that come less if they are sure."""

import json
import random
from collections import Counter

import pytest

from nemotron.posttrain.config import CurriculumConfig, RlConfig, RolloutConfig
from nemotron.posttrain.curriculum import Curriculum
from nemotron.posttrain.environments.base import build_row
from nemotron.posttrain.environments.registry import find_environment
from nemotron.posttrain.tasks import Tasks
from tests.support.rl import rl_values

EASY = build_row("arith_chain", "1+1=", question="1+1", expected_answer="2")
HARD = build_row("arith_chain", "7-9=", question="7-9", expected_answer="-2")


def curriculum(highest: int = 100, **values: float) -> Curriculum:
    rollout = RolloutConfig(num_prompts_per_step=4, num_generations_per_prompt=2, max_new_tokens=4)
    given = {"raise_at": 0.75, "window": 4, "max_level": 2.0, **values}
    return Curriculum(CurriculumConfig.model_validate(given), rollout, {"arith_chain": highest})


def newest(subject: Curriculum) -> float:
    return subject.metrics()["rl/level/arith_chain"]


def test_a_level_is_added_when_the_newest_one_is_solved_often_enough() -> None:
    subject = curriculum()
    for rate in (1.0, 0.0, 1.0):
        subject.learn("arith_chain", 0.0, EASY, rate)
    assert newest(subject) == 0
    subject.learn("arith_chain", 0.0, EASY, 0.5)  # 2.5 of 4
    assert newest(subject) == 0
    subject.learn("arith_chain", 0.0, EASY, 1.0)  # the newest four: 0, 1, 0.5, 1
    subject.learn("arith_chain", 0.0, EASY, 1.0)  # 1, 0.5, 1, 1
    assert newest(subject) == 1
    for _ in range(9):  # an old level adds nothing
        subject.learn("arith_chain", 0.0, EASY, 1.0)
    assert newest(subject) == 1
    for level in (1.0, 2.0):
        for _ in range(4):
            subject.learn("arith_chain", level, EASY, 1.0)
    assert newest(subject) == 2  # not above max_level


def test_no_level_is_added_above_the_highest_one_of_the_environment() -> None:
    subject = curriculum(highest=1)
    for level in (0.0, 1.0):
        for _ in range(4):
            subject.learn("arith_chain", level, EASY, 1.0)
    assert newest(subject) == 1


def test_levels_come_by_what_they_teach() -> None:
    subject = curriculum(least_weight=0.2)
    for _ in range(4):
        subject.learn("arith_chain", 0.0, EASY, 1.0)
    for _ in range(4):
        subject.learn("arith_chain", 1.0, HARD, 0.5)
    rng = random.Random(1)
    found = Counter(subject.level("arith_chain", rng) for _ in range(1200))
    # weights 0.2 and 1: 200 and 1000 are expected, with a deviation of 13
    assert found.keys() == {0.0, 1.0}
    assert 140 < found[0.0] < 260


@pytest.mark.parametrize(("rate", "expected"), [(None, 1.0), (0.5, 1.0), (0.9, 0.36), (0.0, 0.1)])
def test_tasks_come_by_how_often_they_are_solved(rate: float | None, expected: float) -> None:
    subject = curriculum()
    if rate is not None:
        subject.learn("arith_chain", 0.0, EASY, rate)
    rng = random.Random(2)
    share = sum(subject.accepts(EASY, rng) for _ in range(2000)) / 2000
    # five deviations of the mean
    assert share == pytest.approx(expected, abs=0.055)


def test_a_stored_state_goes_on_to_the_same_draws() -> None:
    subject = curriculum()
    for number, row in enumerate(find_environment("arith_chain").rows(30, 1, 0)):
        subject.learn("arith_chain", 0.0, row, number % 4 / 3)
    again = curriculum()
    again.restore(json.loads(json.dumps(subject.state())))
    assert again.state() == subject.state()
    rows = list(find_environment("arith_chain").rows(30, 1, 0))
    draws = [
        [each.accepts(row, random.Random(7)) for row in rows for each in (one,)]
        for one in (subject, again)
    ]
    assert draws[0] == draws[1]
    levels = subject.state()["levels"]
    for damaged in (
        None,
        {},
        {"levels": {}, "tasks": []},
        {"levels": {"mcqa": []}, "tasks": []},
        {"levels": levels, "tasks": [["a", 10**400]]},
        {"levels": levels, "tasks": [["a", "0.5"]]},
        {"levels": levels, "tasks": [["a", 2.0]]},
        {"levels": levels, "tasks": ["ab"]},
        {"levels": {"arith_chain": [[0.0, None]]}, "tasks": []},
    ):
        with pytest.raises(ValueError, match="the curriculum is"):
            curriculum().restore(damaged)


def test_a_batch_has_few_tasks_that_are_always_solved() -> None:
    values = rl_values(rollout={"num_prompts_per_step": 40, "curriculum": {"least_weight": 0.01}})
    values["rollout"]["environments"] = [{"name": "arith_chain"}]
    tasks = Tasks(RlConfig.model_validate(values | {"name": "unused"}))
    subject = curriculum(least_weight=0.01, max_level=0.5)
    solved = list(find_environment("arith_chain").rows(4000, 9, 0))
    easy = [row for row in solved if "+" in row["question"]]
    for row in easy:
        subject.learn("arith_chain", 0.0, row, 1.0)
    # sums and differences are as frequent, but the sums are known to be solved
    signs = Counter("+" in task.row["question"] for task in tasks.batch(3, subject))
    assert signs[True] < 4
    assert len(tasks.batch(3, subject)) == 40
    plain = Counter("+" in task.row["question"] for task in tasks.batch(3))
    assert plain[True] > 10
