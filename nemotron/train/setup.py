"""What a stage of training brings to the loop."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from nemotron.data.tokenizer import Tokenizer
from nemotron.parallel.runtime import Ranks
from nemotron.train.schedule import TrainingPlan
from nemotron.train.trainer import Trainer


class Content(Protocol):
    """What a run learns from, as far as its folder and the log show it."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model is trained with."""
        ...

    @property
    def has_conversations(self) -> bool:
        """Whether the model learns the chat format, so that its export must have a template."""
        ...

    def describe(self) -> list[str]:
        """Return lines for the log."""
        ...


@dataclass(frozen=True)
class Setup:
    """A run before its first step."""

    trainer: Trainer
    content: Content
    validate: Callable[[], dict[str, float]] | None
    """Returns the metrics of what is held out; None where nothing is."""
    close: Callable[[], None] = lambda: None
    """Ends what the stage started, such as processes."""


class Stage(Protocol):
    """A stage of training: how long its runs are, and what they are made of."""

    def plan(self, config: Any) -> TrainingPlan:  # Any: the stage's own configuration
        """Return the steps of a run and their learning rates.

        Raises:
            UserError: when they contradict each other.
        """
        ...

    def rehearse(self, config: Any, plan: TrainingPlan) -> list[str]:
        """Open what a run learns from without writing anything; returns lines about it.

        Raises:
            UserError: when it is unfit.
        """
        ...

    def build(
        self,
        config: Any,
        plan: TrainingPlan,
        device: torch.device,
        peak_flops: float,
        ranks: Ranks,
    ) -> Setup:
        """Open what a run learns from, and build its trainer.

        Raises:
            UserError: when it is unfit.
        """
        ...
