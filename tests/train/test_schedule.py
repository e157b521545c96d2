"""The learning-rate schedule against the published run's values and its own continuity."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron.errors import UserError
from nemotron.train.config import ScheduleConfig
from nemotron.train.schedule import TrainingPlan, build_schedule, plan_training

TOKENS = 25_165_824


def super_schedule(**changes):
    """The schedule of the shipped Super recipe, in iterations."""
    values = {
        "peak": 4.5e-4,
        "min": 4.5e-6,
        "total_steps": 992_411,
        "warmup_steps": 7_949,
        "decay_steps": 198_682,
    }
    return build_schedule(ScheduleConfig(**(values | changes)), TOKENS)


@pytest.mark.parametrize(
    ("iteration", "expected"),
    [
        (1, 5.66108945e-08),
        (1_000, 5.66108945e-05),
        (7_949, 4.5e-4),
        (793_729, 4.5e-4),
        (793_730, 4.49000533e-04),
        (794_723, 4.18489040e-04),
        (800_000, 3.70852565e-04),
        (843_400, 2.27248879e-04),
        (893_070, 1.34983929e-04),
        (943_000, 6.38498855e-05),
        (992_411, 4.5e-06),
        (993_404, 4.5e-06),
    ],
)
def test_minus_sqrt_decay_has_the_values_of_the_super_run(iteration, expected):
    # The published values have nine digits.
    assert super_schedule().lr(iteration - 1) == pytest.approx(expected, rel=1e-8)


def test_lengths_in_tokens_and_in_steps_are_the_same_schedule():
    in_tokens = super_schedule(
        total_steps=None,
        warmup_steps=None,
        decay_steps=None,
        total_tokens=float(992_411 * TOKENS),
        warmup_tokens=float(7_949 * TOKENS),
        decay_tokens=float(198_682 * TOKENS),
    )
    for step in (0, 7_948, 7_949, 500_000, 793_729, 900_000, 992_410):
        assert in_tokens.lr(step) == super_schedule().lr(step)


def test_a_run_of_25_trillion_tokens_has_the_reported_number_of_steps():
    schedule = ScheduleConfig(peak=1e-3, total_tokens=25e12, warmup_tokens=8.4e9, decay_tokens=5e12)
    assert build_schedule(schedule, TOKENS).num_steps == 993_411


@pytest.mark.parametrize(
    ("shape", "quarter"),
    [
        ("minus_sqrt", 0.5),
        ("linear", 0.75),
        ("cosine", (math.cos(math.pi / 4) + 1) / 2),
        ("exponential", 2 * 0.5**0.25 - 1),
    ],
)
def test_each_decay_shape_starts_at_the_peak_and_ends_at_the_minimum(shape, quarter):
    config = ScheduleConfig(peak=1.0, min=0.2, total_steps=150, decay_steps=100, decay=shape)
    schedule = build_schedule(config, 7)
    assert schedule.lr(49) == 1.0
    assert schedule.lr(74) == pytest.approx(0.2 + 0.8 * quarter)
    assert schedule.lr(149) == pytest.approx(0.2)
    assert schedule.lr(150) == 0.2


@pytest.mark.parametrize(("kind", "middle"), [("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)])
def test_other_kinds_decay_from_the_end_of_the_warm_up(kind, middle):
    config = ScheduleConfig(kind=kind, peak=1.0, total_steps=30, warmup_steps=10)
    schedule = build_schedule(config, 3)
    assert schedule.lr(4) == pytest.approx(0.5)
    assert schedule.lr(9) == 1.0
    assert schedule.lr(19) == pytest.approx(middle)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"total_steps": None}, "no length"),
        ({"total_tokens": 1e9}, "total_tokens and total_steps"),
        ({"decay_steps": None}, "wsd needs the length of its decay"),
        ({"kind": "cosine"}, "takes no decay length"),
        ({"warmup_steps": 900_000}, "do not fit"),
        ({"min": 1e-3}, "above schedule.peak"),
    ],
)
def test_an_impossible_schedule_is_answered_in_one_sentence(changes, words):
    with pytest.raises(UserError, match=words) as error:
        super_schedule(**changes)
    assert "\n" not in str(error.value)


@given(
    warmup=st.integers(0, 1000),
    decay=st.integers(1, 1000),
    total=st.floats(1, 1e9),
    tokens_per_step=st.integers(1, 10**7),
)
def test_fractions_that_fit_together_fit_into_a_run_of_any_length(
    warmup: int, decay: int, total: float, tokens_per_step: int
):
    config = ScheduleConfig(
        peak=1.0,
        total_tokens=total,
        warmup_fraction=warmup / 1000,
        decay_fraction=decay / 1000,
    )
    if warmup + decay > 1000 or warmup == 1000:
        with pytest.raises(UserError, match="do not fit"):
            build_schedule(config, tokens_per_step)
        return
    found = build_schedule(config, tokens_per_step)
    assert found.warmup + found.decay <= total
    assert found.warmup < total
    assert found.warmup % tokens_per_step == 0
    assert abs(found.warmup - total * warmup / 1000) <= tokens_per_step
    assert abs(found.decay - total * decay / 1000) <= tokens_per_step
    assert found.lr(found.num_steps - 1) <= 1


SCHEDULE = {"peak": 1.0, "min": 0.1, "warmup_tokens": 310, "decay_tokens": 620}


@pytest.fixture
def plan(recipe):
    """Return the plan of a tiny run of steps of 155 tokens with these phases."""

    def build(phases: list[dict], **schedule: object) -> TrainingPlan:
        return plan_training(recipe(phases=phases, schedule=SCHEDULE | schedule))

    return build


def test_without_phases_the_schedule_is_the_course(recipe):
    config = recipe()
    found = plan_training(config)
    assert (found.num_steps, found.timeline.num_tokens) == (8, 8 * 155)
    assert found.lr(1) == 1e-2


def test_phases_add_up_to_the_run_and_the_schedule_runs_through_them(plan):
    phases = [{"name": "a", "tokens": 155 * 4}, {"name": "b", "steps": 3, "global_tokens": 310}]
    found = plan(phases)
    assert found.num_steps == 7
    assert found.timeline.num_tokens == 155 * 4 + 3 * 310 == 1550
    assert found.lr(0) == pytest.approx(0.5)
    assert [found.lr(step) for step in (1, 2, 3, 4)] == [1.0] * 4
    assert found.lr(5) == pytest.approx(0.1 + 0.9 * (1 - 0.5**0.5))
    assert found.lr(6) == pytest.approx(0.1)


def test_the_last_phase_takes_what_the_schedule_has_left(plan):
    phases = [{"name": "a", "steps": 4}, {"name": "b", "global_tokens": 310}]
    assert plan(phases, total_tokens=1550).timeline.phases[1].num_steps == 3
    assert plan(phases, total_tokens=1600).timeline.phases[1].num_steps == 4


def test_each_step_is_in_a_part_of_the_schedule(plan, recipe):
    phases = [
        {"name": "a", "steps": 6},
        {"name": "long", "steps": 2, "schedule": {"kind": "constant", "peak": 0.25}},
        {"name": "b", "steps": 3},
    ]
    found = plan(phases)
    parts = [found.part(step) for step in range(found.num_steps)]
    # step 1 reaches the peak; the last four of the nine steps of `a` and `b` decay
    assert parts[:6] == ["a warm-up"] + ["a stable"] * 4 + ["a decay"]
    assert parts[6:] == ["long stable"] * 2 + ["b decay"] * 3
    assert plan_training(recipe()).part(0) == "warm-up"


def test_a_phase_with_a_schedule_of_its_own_counts_for_itself(plan):
    phases = [
        {"name": "a", "steps": 10},
        {"name": "long", "steps": 4, "schedule": {"kind": "constant", "peak": 0.25}},
        {"name": "b", "steps": 2},
    ]
    found = plan(phases)
    assert [found.lr(step) for step in range(10, 14)] == [0.25] * 4
    # the run's schedule of 12 steps goes on as if the phase between had not been there
    alone = plan([{"name": "a", "steps": 12}])
    assert [found.lr(14), found.lr(15)] == [alone.lr(10), alone.lr(11)]
    assert found.lr(15) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("phases", "schedule", "sentence"),
    [
        ([{"name": "a", "tokens": 200}], {}, r"phases.0.tokens = 200 .* the nearest is 155 \(st"),
        ([{"name": "a", "tokens": 155, "steps": 1}], {}, "tokens and steps; keep one"),
        ([{"name": "a"}, {"name": "b", "steps": 9}], {}, "phases.0 has no length"),
        ([{"name": "a", "steps": 9}, {"name": "b"}], {}, "schedule has no length"),
        ([{"name": "a", "steps": 9}, {"name": "b"}], {"total_steps": 9}, "phases.1 has nothing le"),
        ([{"name": "a", "steps": 9}], {"total_steps": 8}, "has 8 steps, which are not the 9 of"),
        (
            [{"name": "a", "steps": 9, "seq_len": 30}],
            {},
            "phases.0.global_tokens = 155 is not divisible by data.seq_len = 30; the nearest is",
        ),
    ],
)
def test_lengths_that_do_not_fit_are_refused(plan, phases, schedule, sentence):
    with pytest.raises(UserError, match=sentence):
        plan(phases, **schedule)
