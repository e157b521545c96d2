"""What a resume needs: where the run stands, what it has met, and its tensors by name."""

import enum
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from nemotron.checkpoint.read import MODEL_PREFIX
from nemotron.checkpoint.state import Counters, PassedOver
from nemotron.parallel.local import LocalModel
from nemotron.precision.apply import Quantization
from nemotron.train.optimizer import Optimizer

RNG = "rng.cpu"
"""Name of the random generator's state in a checkpoint."""
SPIKE_WINDOW = 128
"""Updates whose losses and gradient norms are remembered to recognize a spike."""
SPIKE_MINIMUM = 32
"""Updates that must be known before a step can be called a spike."""
SPIKE_SIGMAS = 6.0
"""Standard deviations above the mean from which a loss is reported as a spike."""


class Diverged(Exception):
    """Too many steps were skipped, and nothing is left to try; says which and why."""


class Skip(enum.Enum):
    """Why a step left weights, moments and router bias as they were."""

    NOT_FINITE = "loss or gradient is not finite"
    SPIKE = "loss or gradient norm is far above the recent ones"
    NO_TARGETS = "no token of the batch has a target"


class TrainerState(Counters):
    """The counters of a run, and how a step changes them."""

    @classmethod
    def fresh(cls) -> "TrainerState":
        """Return the counters before the first step."""
        return cls(
            step=0,
            tokens=0,
            skipped_steps=0,
            nonfinite_in_a_row=0,
            spikes_in_a_row=0,
            recent_losses=[],
            recent_grad_norms=[],
            bad_steps=[],
            passed_over=[],
        )

    def is_spike(self, loss: float, grad_norm: float, sigmas: float | None) -> bool:
        """Say whether a step is far above the recent ones; without `sigmas`, its loss alone."""
        if sigmas is None:
            return _is_far_above(loss, self.recent_losses, SPIKE_SIGMAS)
        return _is_far_above(loss, self.recent_losses, sigmas) or _is_far_above(
            grad_norm, self.recent_grad_norms, sigmas
        )

    def advance(self, tokens: int, loss: float, grad_norm: float, skip: Skip | None) -> None:
        """Count a step, whether it was done or skipped."""
        if skip is None:
            self.nonfinite_in_a_row = self.spikes_in_a_row = 0
            self.recent_losses = [*self.recent_losses, loss][-SPIKE_WINDOW:]
            self.recent_grad_norms = [*self.recent_grad_norms, grad_norm][-SPIKE_WINDOW:]
        else:
            self.skipped_steps += 1
            self.nonfinite_in_a_row += skip is Skip.NOT_FINITE
            self.spikes_in_a_row += skip is Skip.SPIKE
            if skip is not Skip.NO_TARGETS:
                self.bad_steps = [*self.bad_steps, self.step]
        self.pass_over(tokens)

    def pass_over(self, tokens: int) -> None:
        """Count a step that was not computed."""
        self.step += 1
        self.tokens += tokens

    def bad_within(self, window: int) -> list[int]:
        """Return the bad ones among the last steps, and forget those before."""
        self.bad_steps = [step for step in self.bad_steps if step >= self.step - window]
        return self.bad_steps

    def range_over(self, step: int) -> PassedOver | None:
        """Return the entry of `passed_over` in which a step lies."""
        return next((steps for steps in self.passed_over if step in steps), None)


def snapshot(
    local: LocalModel, optimizer: Optimizer, quantization: Quantization
) -> dict[str, Tensor]:
    """Return every tensor that a resume needs, sharing its memory, as what is here of the whole."""
    moments = optimizer.tensors()
    tensors = {
        f"{MODEL_PREFIX}{name}": local.sharded(name, local.held(parameter))
        for name, parameter in local.parameters().items()
    }
    tensors |= {f"{MODEL_PREFIX}{name}": buffer for name, buffer in local.buffers().items()}
    steps = moments.pop("step")
    for key, named in moments.items():
        for name, moment in named.items():
            tensors[f"optimizer.{key}.{name}"] = local.sharded(name, moment)
    tensors |= {f"optimizer.step.{name}": step for name, step in steps.items()}
    return tensors | quantization.tensors() | {RNG: torch.get_rng_state()}


def _is_far_above(value: float, recent: Sequence[float], sigmas: float) -> bool:
    if len(recent) < SPIKE_MINIMUM:
        return False
    return value > statistics.fmean(recent) + sigmas * statistics.pstdev(recent)
