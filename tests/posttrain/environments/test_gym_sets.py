"""Questions of reasoning-gym, and answers that its sets would give a part of the score."""

from typing import Any

import pytest

pytest.importorskip("reasoning_gym", reason="the package reasoning-gym is not installed")

from nemotron.errors import UserError
from nemotron.posttrain.environments.base import BadRow, Row, build_row
from nemotron.posttrain.environments.gym_sets import CHOSEN, ReasoningGym
from tests.support.verdicts import (
    assert_enough,
    assert_good_rows,
    judge,
    rows_elsewhere,
    rows_here,
)


@pytest.fixture(scope="module")
def environment() -> ReasoningGym:
    return ReasoningGym()


@pytest.fixture(scope="module")
def rows(environment: ReasoningGym) -> list[Row]:
    """Two rows of each set."""
    return list(environment.rows(2 * len(CHOSEN), 7, 0))


RIGHT = ["<answer>{}</answer>", "<answer> {} </answer>", "So \\boxed{{{}}}."]
RIGHT += ["<answer>0</answer> no: <answer>{}</answer>", "\\boxed{{0}} <answer>{}</answer>"]
WRONG = ["", "{}", "<answer></answer>", "<answer>no idea</answer>"]
HACKS = ["<answer>{} or 77777</answer>", "<answer>it is surely {}</answer>"]
HACKS += ["<answer>{}</answer> <answer>no idea</answer>", "\\boxed{{{}"]


@pytest.mark.parametrize("form", RIGHT)
def test_right_answers_to_every_set_earn_one(form: str, environment: ReasoningGym, rows: list[Row]):
    for row in rows:
        assert judge(environment, row, form.format(row["entry"]["answer"])) == 1


@pytest.mark.parametrize("form", [*WRONG, *HACKS])
def test_wrong_answers_and_hacks_of_every_set_earn_nothing(
    form: str, environment: ReasoningGym, rows: list[Row]
):
    for row in rows:
        assert judge(environment, row, form.format(row["entry"]["answer"])) == 0


def test_the_cases_are_many_enough():
    count = 2 * len(CHOSEN)
    assert_enough(RIGHT * count, WRONG * count, HACKS * count)


def test_rows_are_good(environment: ReasoningGym):
    assert_good_rows(environment)
    assert rows_elsewhere(["reasoning_gym"]) == rows_here(["reasoning_gym"])


def test_levels_follow_the_curriculum(environment: ReasoningGym):
    def length(level: int) -> int:
        return sum(len(row["entry"]["question"]) for row in environment.rows(36, 1, level))

    assert length(0) < length(3)
    assert ReasoningGym(["gcd"]).max_level == 3
    assert environment.max_level == 35  # of leg_counting, whose curriculum is the longest


def test_an_unknown_set_is_refused(environment: ReasoningGym, rows: list[Row]):
    with pytest.raises(UserError, match="datasets contains 'chess', which is unknown"):
        ReasoningGym(["chess"])
    changes: dict[str, Any]
    for changes, said in (({"dataset": "chess"}, "'chess'"), ({"entry": {}}, "entry lacks")):
        with pytest.raises(BadRow, match=said):
            environment.check({**rows[0], **changes})
    with pytest.raises(BadRow, match="dataset is absent"):
        environment.check(build_row("reasoning_gym", "?"))


def test_rows_of_gym_are_entries_and_a_whole_answer_may_be_the_answer(
    environment: ReasoningGym, rows: list[Row]
):
    for row in rows:
        entry = row["entry"]
        metadata = {**entry["metadata"], "source_dataset": row["dataset"]}
        theirs = {**build_row("reasoning_gym", entry["question"]), **entry, "metadata": metadata}
        assert judge(environment, theirs, f"<answer>{entry['answer']}</answer>") == 1
        assert judge(environment, theirs, entry["answer"]) == 1
        assert judge(environment, theirs, "no idea") == 0
