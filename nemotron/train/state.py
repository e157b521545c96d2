"""What a resume needs beside tensors: where the run stands and what it has met."""

import enum
import statistics
from dataclasses import dataclass, field

SPIKE_WINDOW = 128
"""Losses that are remembered to tell a spike."""
SPIKE_MINIMUM = 32
"""Losses that must be known before one can be called a spike."""
SPIKE_SIGMAS = 6.0
"""Standard deviations above the mean from which a loss is a spike."""


class Skip(enum.Enum):
    """Why a step left weights, moments and router bias as they were."""

    NOT_FINITE = "loss or gradient is not finite"
    NO_TARGETS = "no token of the batch has a target"


@dataclass
class TrainerState:
    """Counters of a run; the data position is the step, because rows are a function of it."""

    step: int = 0
    """Steps done, skipped ones included."""
    tokens: int = 0
    """Tokens consumed by them."""
    skipped_steps: int = 0
    nonfinite_in_a_row: int = 0
    recent_losses: list[float] = field(default_factory=list)
    """Of the last steps that were not skipped."""

    def advance(self, tokens: int, loss: float, skip: Skip | None) -> bool:
        """Count a step, whatever became of it; says whether its loss is a spike."""
        self.step += 1
        self.tokens += tokens
        if skip is not None:
            self.skipped_steps += 1
            self.nonfinite_in_a_row += skip is Skip.NOT_FINITE
            return False
        self.nonfinite_in_a_row = 0
        recent = self.recent_losses
        self.recent_losses = [*recent, loss][-SPIKE_WINDOW:]
        if len(recent) < SPIKE_MINIMUM:
            return False
        return loss > statistics.fmean(recent) + SPIKE_SIGMAS * statistics.pstdev(recent)
