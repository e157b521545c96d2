"""The phases of a run and the learning rate of every step, from the recipe alone."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from nemotron.data.config import BlendConfig, LengthConfig, leaves
from nemotron.data.mixture import Phase, RowLength, Timeline
from nemotron.errors import UserError
from nemotron.train.config import PhaseConfig, ScheduleConfig, TextConfig, length_keys

DECAYS: dict[str, Callable[[float], float]] = {
    "minus_sqrt": lambda r: 1 - math.sqrt(r),
    "linear": lambda r: 1 - r,
    "cosine": lambda r: (math.cos(math.pi * r) + 1) / 2,
    "exponential": lambda r: 2 * 0.5**r - 1,
}
"""What is left of the way from peak to minimum, when the share r of the decay is done.

Source: NVIDIA/Megatron-LM: megatron/core/optimizer_param_scheduler.py.
"""

ROUNDING = 1e-12
"""Share of a length by which a sum of two fractions of it may pass it."""


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from zero, a plateau, a decay that ends with the run; lengths in tokens."""

    peak: float
    min: float
    warmup: float
    decay: float
    """Length of the decay; 0: the rate stays at the peak."""
    total: float
    shape: str
    tokens_per_step: int

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run; the last one may pass the total."""
        return math.ceil(self.total / self.tokens_per_step)

    def lr(self, step: int) -> float:
        """Return the rate of the optimizer step with this index, counted from 0."""
        return self.lr_at((step + 1) * self.tokens_per_step)

    def lr_at(self, tokens: float) -> float:
        """Return the rate of the step after which `tokens` will have been consumed."""
        part = self.part_at(tokens)
        if part == "warm-up":
            return self.peak * tokens / self.warmup
        if part == "stable":
            return self.peak
        if tokens > self.total:
            return self.min
        done = (tokens - (self.total - self.decay)) / self.decay
        return self.min + (self.peak - self.min) * DECAYS[self.shape](done)

    def part_at(self, tokens: float) -> str:
        """Return `warm-up`, `stable` or `decay` for the step of `lr_at`."""
        if tokens < self.warmup:
            return "warm-up"
        is_stable = not self.decay or tokens <= self.total - self.decay
        return "stable" if is_stable else "decay"


@dataclass(frozen=True)
class Stretch:
    """Steps of one size, one after the other."""

    steps: int
    tokens_per_step: int


def build_schedule(
    config: ScheduleConfig, tokens_per_step: int, stretches: Sequence[Stretch] = ()
) -> Schedule:
    """Turn the recipe's section into tokens; `stretches` are the steps that the schedule covers.

    Without them, all steps have the same size.

    Raises:
        UserError: when a length is missing, given twice or longer than the run.
    """
    total = _length(config, "total", tokens_per_step, None, stretches)
    if total is None:
        raise UserError("has no length; give schedule.total_tokens or total_steps.", key="schedule")
    warmup = _length(config, "warmup", tokens_per_step, total, stretches) or 0.0
    decay = _length(config, "decay", tokens_per_step, total, stretches[::-1])
    if config.kind == "wsd":
        if decay is None:
            raise UserError(
                "needs the length of its decay; "
                "give schedule.decay_tokens, decay_steps or decay_fraction.",
                key="schedule.kind",
                value=config.kind,
            )
    elif decay is not None:
        raise UserError(
            f"takes no decay length; "
            f"remove schedule.{_given(config, 'decay')[0]} or use kind: wsd.",
            key="schedule.kind",
            value=config.kind,
        )
    if warmup + (decay or 0.0) > total * (1 + ROUNDING) or warmup >= total:
        raise UserError(
            f"has warm-up {warmup:,.0f} + decay {decay or 0:,.0f} tokens, which do not fit into "
            f"the run's {total:,.0f}; {_remedy(config)}.",
            key="schedule",
        )
    warmup, decay = _in_whole_steps(config, warmup, decay or 0.0, total, tokens_per_step)
    if config.kind in ("cosine", "linear"):
        decay = total - warmup
    if config.min > config.peak:
        raise UserError(
            f"is above schedule.peak = {config.peak:g}; lower it.",
            key="schedule.min",
            value=f"{config.min:g}",
        )
    shape = config.decay if config.kind == "wsd" else config.kind
    return Schedule(config.peak, config.min, warmup, decay, total, shape, tokens_per_step)


@dataclass(frozen=True)
class TrainingPlan:
    """What every step reads, and at which rate it learns."""

    timeline: Timeline
    schedules: tuple[Schedule, ...]
    """The schedule of each phase: the run's, or one of its own."""
    counted_from: tuple[int, ...]
    """For each phase, the tokens of the run that its schedule does not count."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.timeline.num_steps

    def lr(self, step: int) -> float:
        """Return the rate of the optimizer step with this index, counted from 0."""
        schedule, tokens = self._at(step)
        return schedule.lr_at(tokens)

    def part(self, step: int) -> str:
        """Return `warm-up`, `stable` or `decay`, after the name of the phase if there are some."""
        schedule, tokens = self._at(step)
        phases = self.timeline.phases
        name = phases[self.timeline.phase_of(step)].name if len(phases) > 1 else ""
        return f"{name} {schedule.part_at(tokens)}".lstrip()

    def _at(self, step: int) -> tuple[Schedule, int]:
        """Return the schedule of a step, and the tokens of it that will then be consumed."""
        phase = self.timeline.phase_of(step)
        tokens = self.timeline.tokens_before(step) + self.timeline.tokens_per_step(step)
        return self.schedules[phase], tokens - self.counted_from[phase]


def plan_training(config: TextConfig) -> TrainingPlan:
    """Work out phases and rates.

    Raises:
        UserError: when lengths are missing, do not fit each other or are not whole steps.
    """
    tokens_per_step = config.batch.global_tokens
    if not config.phases:
        check_rows("batch.global_tokens", tokens_per_step, _lengths(config, None))
        schedule = build_schedule(config.schedule, tokens_per_step)
        phase = Phase("all", schedule.num_steps, tokens_per_step, _row_lengths(config, None))
        return TrainingPlan(Timeline([phase]), (schedule,), (0,))
    main, steps = _main_schedule(config)
    phases, schedules, counted_from = [], [], []
    tokens = covered = 0
    for number, (own, num_steps) in enumerate(zip(config.phases, steps, strict=True)):
        size = own.global_tokens or tokens_per_step
        check_rows(f"phases.{number}.global_tokens", size, _lengths(config, own))
        phases.append(Phase(own.name, num_steps, size, _row_lengths(config, own)))
        length = num_steps * size
        if own.schedule is None:
            schedules.append(main)
            counted_from.append(tokens - covered)
            covered += length
        else:
            alone = own.schedule.model_copy(update={"total_tokens": float(length)})
            schedules.append(build_schedule(alone, size))
            counted_from.append(tokens)
        tokens += length
    return TrainingPlan(Timeline(phases), tuple(schedules), tuple(counted_from))


def check_rows(key: str, tokens_per_step: int, lengths: Sequence[LengthConfig]) -> None:
    """Check that the tokens of a step are whole rows.

    Raises:
        UserError: when they are not, with the nearest number that is.
    """
    whole = math.lcm(*(length.seq_len for length in lengths))
    if tokens_per_step % whole:
        near = max(1, round(tokens_per_step / whole)) * whole
        raise UserError(
            f"is not divisible by data.seq_len = "
            f"{' and '.join(str(length.seq_len) for length in lengths)}; the nearest is {near}.",
            key=key,
            value=tokens_per_step,
        )


def _length(
    config: ScheduleConfig,
    name: str,
    tokens_per_step: int,
    total: float | None,
    stretches: Sequence[Stretch],
) -> float | None:
    """Return a length in tokens; fractions are of `total`, steps those of the stretches in turn."""
    given = _given(config, name)
    if len(given) > 1:
        raise UserError(
            f"has {given[0]} and {given[1]}; keep one of them.",
            key="schedule",
        )
    if not given:
        return None
    value = float(getattr(config, given[0]))
    if given[0].endswith("_steps"):
        return _tokens_of(int(value), stretches, tokens_per_step)
    if given[0].endswith("_fraction"):
        assert total is not None
        return value * total
    return value


def _in_whole_steps(
    config: ScheduleConfig, warmup: float, decay: float, total: float, tokens_per_step: int
) -> tuple[float, float]:
    """Round what is given as a fraction, so that it means the same in every unit of the total.

    What leaves a step to the rest of the run still does once it is rounded.
    """
    step = float(tokens_per_step)
    last = (math.ceil(total / step) - 1) * step
    if config.warmup_fraction is not None:
        warmup = min(round(warmup / step) * step, last)
    if config.decay_fraction is not None:
        most = total - max(warmup, step) if decay < total else total
        decay = max(min(round(decay / step) * step, most), 0.0)
    return warmup, decay


def _remedy(config: ScheduleConfig) -> str:
    """Say how warm-up and decay would fit into the run."""
    given = [key for part in ("warmup", "decay") for key in _given(config, part)]
    advice = f"shorten {' or '.join(given)}"
    fixed = [key for key in given if not key.endswith("_fraction")]
    if not fixed:
        return advice
    shares = " and ".join(f"{key.partition('_')[0]}_fraction" for key in fixed)
    return f"{advice}, or give {shares} instead, which follow{'s' * (len(fixed) == 1)} its length"


def _tokens_of(steps: int, stretches: Sequence[Stretch], tokens_per_step: int) -> float:
    """Return the tokens of the first steps; those after all stretches have the usual size."""
    tokens, left = 0, steps
    for stretch in stretches:
        taken = min(left, stretch.steps)
        tokens, left = tokens + taken * stretch.tokens_per_step, left - taken
    return float(tokens + left * tokens_per_step)


def _given(config: ScheduleConfig, name: str) -> list[str]:
    """Return the keys that give this length."""
    return [key for key in length_keys(name) if getattr(config, key) is not None]


def _lengths(config: TextConfig, phase: PhaseConfig | None) -> Sequence[LengthConfig]:
    """Return the lengths of row of a phase, or of a run without phases."""
    own = phase or PhaseConfig(name="all")
    if own.lengths or (not own.seq_len and config.data.lengths):
        return own.lengths or config.data.lengths
    return [LengthConfig(seq_len=own.seq_len or config.data.seq_len, share=1.0)]


def _row_lengths(config: TextConfig, phase: PhaseConfig | None) -> tuple[RowLength, ...]:
    blend: BlendConfig = (phase and phase.blend) or config.data.blend
    return tuple(
        RowLength(
            length.seq_len,
            length.share,
            tuple(leaves(length.blend or blend)),
            (length.blend or blend).validation,
        )
        for length in _lengths(config, phase)
    )


def _main_schedule(config: TextConfig) -> tuple[Schedule, list[int]]:
    """Return the run's schedule over the phases without one of their own, and all their steps."""
    size_of = [phase.global_tokens or config.batch.global_tokens for phase in config.phases]
    known = list(_given_steps(config, size_of))
    covered = [i for i, phase in enumerate(config.phases) if phase.schedule is None]
    schedule = config.schedule
    for number, steps in enumerate(known):
        if steps is None and (not covered or number != covered[-1]):
            raise UserError(
                "has no length; give tokens or steps (only the last phase without a schedule of "
                "its own may go on to the end of the run's schedule).",
                key=f"phases.{number}",
            )
    given = [Stretch(known[i] or 0, size_of[i]) for i in covered]
    is_open = bool(covered) and known[covered[-1]] is None
    if is_open:
        known[covered[-1]] = _left_over(schedule, given, f"phases.{covered[-1]}")
        given[-1] = Stretch(known[covered[-1]] or 0, given[-1].tokens_per_step)
    else:
        _check_total(schedule, given)
    if schedule.total_tokens is None:
        tokens = sum(stretch.steps * stretch.tokens_per_step for stretch in given)
        whole = {"total_tokens": float(max(tokens, 1)), "total_steps": None}
        schedule = schedule.model_copy(update=whole)
    main = build_schedule(schedule, config.batch.global_tokens, given)
    return main, [steps or 0 for steps in known]


def _left_over(schedule: ScheduleConfig, given: Sequence[Stretch], key: str) -> int:
    """Return the steps of the last stretch, which reaches the end of the schedule.

    Raises:
        UserError: when the schedule has no length, or nothing of it is left.
    """
    steps = sum(stretch.steps for stretch in given)
    tokens = sum(stretch.steps * stretch.tokens_per_step for stretch in given)
    lengths = _given(schedule, "total")
    if len(lengths) != 1:
        build_schedule(schedule, given[-1].tokens_per_step)  # refuses two lengths, or none
    if schedule.total_steps is not None:
        left, whole = schedule.total_steps - steps, f"{steps} of the {schedule.total_steps} steps"
    else:
        total = schedule.total_tokens or 0.0
        left = math.ceil((total - tokens) / given[-1].tokens_per_step)
        whole = f"{tokens} of the {total:.0f} tokens"
    if left < 1:
        raise UserError(
            f"has nothing left: the phases before it take {whole} of the schedule; shorten them "
            "or lengthen the schedule.",
            key=key,
        )
    return left


def _check_total(schedule: ScheduleConfig, given: Sequence[Stretch]) -> None:
    """Refuse a length of the schedule that is not the length of the phases that follow it."""
    steps = sum(stretch.steps for stretch in given)
    tokens = sum(stretch.steps * stretch.tokens_per_step for stretch in given)
    wrong = None
    if schedule.total_steps not in (None, steps):
        wrong = f"{schedule.total_steps} steps, which are not the {steps}"
    elif schedule.total_tokens is not None and round(schedule.total_tokens) != tokens:
        wrong = f"{schedule.total_tokens:.0f} tokens, which are not the {tokens}"
    if wrong is not None:
        raise UserError(
            f"has {wrong} of the phases that follow it; remove schedule.total_tokens and "
            "total_steps, or the length of the last phase.",
            key="schedule",
        )


def _given_steps(config: TextConfig, size_of: Sequence[int]) -> Iterator[int | None]:
    """Yield the steps of each phase, None for one that reaches the end."""
    for number, (phase, size) in enumerate(zip(config.phases, size_of, strict=True)):
        if phase.tokens is None:
            yield phase.steps
            continue
        if phase.steps is not None:
            raise UserError("has tokens and steps; keep one of them.", key=f"phases.{number}")
        if phase.tokens % size:
            near = max(1, round(phase.tokens / size))
            raise UserError(
                f"are not whole steps of {size} tokens; the nearest is {near * size} "
                f"(steps: {near}).",
                key=f"phases.{number}.tokens",
                value=f"{phase.tokens:.0f}",
            )
        yield round(phase.tokens / size)
