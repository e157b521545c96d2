"""What a stage of training brings to the loop."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from nemotron.data.chat.template import TURN_END
from nemotron.data.tokenizer import Tokenizer
from nemotron.errors import UserError
from nemotron.parallel.runtime import Ranks
from nemotron.train.config import RunConfig
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
    examine: Callable[[], dict[str, float]] | None = None
    """Returns the metrics of tasks that the model answers; None where none are asked."""


def check_end_of_text(config: RunConfig, tokenizer: Tokenizer, *, is_chat: bool) -> None:
    """Check that generation will stop at a token that the model learns to end with.

    Raises:
        UserError: when the model's end of text is another token than that of the data.
    """
    eos, end = config.model.eos_token_id, config.data.eod_token
    ends = [end, *([TURN_END] if is_chat else [])]
    if eos in map(tokenizer.id, ends):
        return
    raise UserError(
        f"is {tokenizer.token(eos)!r} in data.tokenizer, but documents end with data.eod_token = "
        f"{end}; set model.eos_token_id = {tokenizer.id(end)}.",
        key="model.eos_token_id",
        value=eos,
    )


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
