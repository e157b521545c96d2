"""What a checkpoint holds beside tensors: counters, and what identifies the data."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import ConfigDict, JsonValue, NonNegativeInt, PlainSerializer, PlainValidator

from nemotron.section import Section


@dataclass(frozen=True)
class PassedOver:
    """Steps that are never computed, after a rollback; in JSON a list of the three numbers."""

    first: int
    """Index of the first one."""
    last: int
    """Index of the last one."""
    origin: int
    """The steps done by the weights to which the run was rolled back."""

    def __contains__(self, step: int) -> bool:
        return self.first <= step <= self.last


def _passed_over(value: object) -> PassedOver:
    if isinstance(value, PassedOver):
        return value
    numbers = value if isinstance(value, list) else []
    if len(numbers) != 3 or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("must be a list of three whole numbers from 0")
    return PassedOver(*numbers)


@dataclass
class Counters:
    """Counters of a run; the data position is the step, because rows are a function of it."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False
    )

    step: NonNegativeInt
    """Steps done, skipped and passed over ones included."""
    tokens: NonNegativeInt
    """Tokens consumed by them."""
    skipped_steps: NonNegativeInt
    nonfinite_in_a_row: NonNegativeInt
    spikes_in_a_row: NonNegativeInt
    """Steps skipped as spikes; both counts go on until a step is not skipped."""
    recent_losses: list[float]
    """Of the last steps that were not skipped."""
    recent_grad_norms: list[float]
    """Of the same steps."""
    bad_steps: list[NonNegativeInt]
    """Indices of recent steps that were skipped as spikes or for not being finite."""
    passed_over: list[
        Annotated[
            PassedOver,
            PlainValidator(_passed_over),
            PlainSerializer(lambda steps: [steps.first, steps.last, steps.origin]),
        ]
    ]
    """In the order of the rollbacks."""


class SavedState(Section):
    """The content of `state.json`. A checkpoint that only holds weights has no counters."""

    trainer: Counters | None = None
    data: dict[str, JsonValue] | None = None
    """Result of `Batches.state`."""
    imported: dict[str, JsonValue] | None = None
    """Where weights come from that were not trained here."""
    merged: dict[str, JsonValue] | None = None
    """Which checkpoints the weights are an average of."""
