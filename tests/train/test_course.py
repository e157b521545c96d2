"""Phases in a recipe: their lengths, their batches, their learning rates."""

import pytest

from nemotron.errors import UserError
from nemotron.train.course import Course, plan_course

SCHEDULE = {"peak": 1.0, "min": 0.1, "warmup_tokens": 310, "decay_tokens": 620}


@pytest.fixture
def course(recipe):
    """Return the course of a tiny run of steps of 155 tokens with these phases."""

    def build(phases: list[dict], **schedule: object) -> Course:
        return plan_course(recipe(phases=phases, schedule=SCHEDULE | schedule))

    return build


def test_without_phases_the_schedule_is_the_course(recipe):
    config = recipe()
    found = plan_course(config)
    assert (found.num_steps, found.timeline.num_tokens) == (8, 8 * 155)
    assert found.lr(1) == 1e-2


def test_phases_add_up_to_the_run_and_the_schedule_runs_through_them(course):
    phases = [{"name": "a", "tokens": 155 * 4}, {"name": "b", "steps": 3, "global_tokens": 310}]
    found = course(phases)
    assert found.num_steps == 7
    assert found.timeline.num_tokens == 155 * 4 + 3 * 310 == 1550
    assert found.lr(0) == pytest.approx(0.5)
    assert [found.lr(step) for step in (1, 2, 3, 4)] == [1.0] * 4
    assert found.lr(5) == pytest.approx(0.1 + 0.9 * (1 - 0.5**0.5))
    assert found.lr(6) == pytest.approx(0.1)


def test_the_last_phase_takes_what_the_schedule_has_left(course):
    phases = [{"name": "a", "steps": 4}, {"name": "b", "global_tokens": 310}]
    assert course(phases, total_tokens=1550).timeline.phases[1].num_steps == 3
    assert course(phases, total_tokens=1600).timeline.phases[1].num_steps == 4


def test_a_phase_with_a_schedule_of_its_own_counts_for_itself(course):
    phases = [
        {"name": "a", "steps": 10},
        {"name": "long", "steps": 4, "schedule": {"kind": "constant", "peak": 0.25}},
        {"name": "b", "steps": 2},
    ]
    found = course(phases)
    assert [found.lr(step) for step in range(10, 14)] == [0.25] * 4
    # the run's schedule of 12 steps goes on as if the phase between had not been there
    alone = course([{"name": "a", "steps": 12}])
    assert [found.lr(14), found.lr(15)] == [alone.lr(10), alone.lr(11)]
    assert found.lr(15) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("phases", "schedule", "sentence"),
    [
        ([{"name": "a", "tokens": 200}], {}, r"phases.0: tokens = 200 .* the nearest is 155 \(st"),
        ([{"name": "a", "tokens": 155, "steps": 1}], {}, "tokens and steps; keep one"),
        ([{"name": "a"}, {"name": "b", "steps": 9}], {}, "phases.0 has no length"),
        ([{"name": "a", "steps": 9}, {"name": "b"}], {}, "schedule has no length"),
        ([{"name": "a", "steps": 9}, {"name": "b"}], {"total_steps": 9}, "phases.1 has nothing le"),
        ([{"name": "a", "steps": 9}], {"total_steps": 8}, "1240 tokens are not the 1395 of the"),
        (
            [{"name": "a", "steps": 9, "seq_len": 30}],
            {},
            "phases.0: global_tokens = 155 is not divisible by data.seq_len = 30; the nearest is",
        ),
    ],
)
def test_lengths_that_do_not_fit_are_refused(course, phases, schedule, sentence):
    with pytest.raises(UserError, match=sentence):
        course(phases, **schedule)
