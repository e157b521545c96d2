"""The learning rate and the length of a run, as functions of the tokens consumed."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from nemotron.errors import UserError
from nemotron.train.config import ScheduleConfig

DECAYS: dict[str, Callable[[float], float]] = {
    "minus_sqrt": lambda r: 1 - math.sqrt(r),
    "linear": lambda r: 1 - r,
    "cosine": lambda r: (math.cos(math.pi * r) + 1) / 2,
    "exponential": lambda r: 2 * 0.5**r - 1,
}
"""What is left of the way from peak to minimum, when the share r of the decay is done.

Source: NVIDIA/Megatron-LM: megatron/core/optimizer_param_scheduler.py.
"""


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
        if tokens < self.warmup:
            return self.peak * tokens / self.warmup
        if not self.decay or tokens <= self.total - self.decay:
            return self.peak
        if tokens > self.total:
            return self.min
        done = (tokens - (self.total - self.decay)) / self.decay
        return self.min + (self.peak - self.min) * DECAYS[self.shape](done)


def build_schedule(config: ScheduleConfig, tokens_per_step: int) -> Schedule:
    """Turn the recipe's section into tokens.

    Raises:
        UserError: when a length is missing, given twice or longer than the run.
    """
    total = _length(config, "total", tokens_per_step)
    if total is None:
        raise UserError("schedule has no length; give schedule.total_tokens or total_steps.")
    warmup = _length(config, "warmup", tokens_per_step) or 0.0
    decay = _length(config, "decay", tokens_per_step)
    if config.kind == "wsd":
        if decay is None:
            raise UserError(
                "schedule.kind = wsd needs the length of its decay; "
                "give schedule.decay_tokens or decay_steps."
            )
    elif decay is not None:
        raise UserError(
            f"schedule.kind = {config.kind} takes no decay length; "
            f"remove schedule.decay_tokens and decay_steps or use kind: wsd."
        )
    else:
        decay = 0.0 if config.kind == "constant" else total - warmup
    if warmup + decay > total or warmup >= total:
        raise UserError(
            f"schedule: warm-up {warmup:.4g} + decay {decay:.4g} tokens do not fit into "
            f"the run's {total:.4g}; shorten one of them."
        )
    if config.min > config.peak:
        raise UserError(
            f"schedule.min = {config.min:g} is above schedule.peak = {config.peak:g}; lower it."
        )
    shape = config.decay if config.kind == "wsd" else config.kind
    return Schedule(config.peak, config.min, warmup, decay, total, shape, tokens_per_step)


def _length(config: ScheduleConfig, name: str, tokens_per_step: int) -> float | None:
    tokens, steps = getattr(config, f"{name}_tokens"), getattr(config, f"{name}_steps")
    if tokens is not None and steps is not None:
        raise UserError(f"schedule has {name}_tokens and {name}_steps; keep one of them.")
    return tokens if steps is None else float(steps * tokens_per_step)
