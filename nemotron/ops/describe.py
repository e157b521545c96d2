"""Which backend of each operation a run will use, and why not a faster one."""

from dataclasses import dataclass

import torch

from nemotron.ops.apply import bind
from nemotron.ops.config import OpsConfig
from nemotron.ops.registry import Call, Operation

AWARE_OF_DOCUMENTS = {"ssd", "causal_conv1d", "attention"}
"""Operations that mix tokens, so that documents in a row matter to them."""


@dataclass(frozen=True)
class Choice:
    """The backend of one operation, and those that would come before it."""

    operation: str
    backend: str
    passed_over: tuple["PassedOver", ...]

    def facts(self) -> dict[str, object]:
        """Return what the provenance of a run holds of it."""
        reasons = {other.backend: other.reason for other in self.passed_over}
        return {"operation": self.operation, "backend": self.backend, "passed_over": reasons}


@dataclass(frozen=True)
class PassedOver:
    """A backend that is not used."""

    backend: str
    reason: str
    runs_here: bool
    """Whether it is for the device and dtype of the run at all."""


def choose_backends(
    config: OpsConfig, device: torch.device, dtype: torch.dtype, documents: bool
) -> list[Choice]:
    """Return what training calls will use.

    Raises:
        UserError: when the recipe names a backend that is unknown, missing or cannot take them.
    """
    choices = []
    for operation in bind(config).values():
        call = training_call(operation, device, dtype, documents)
        chosen = operation.choose(call)
        passed_over: list[PassedOver] = []
        for backend in operation.backends:
            if backend is chosen:
                break
            if backend.by_name:
                continue
            reason = backend.unfit(call) or "the recipe names another one"
            passed_over.append(PassedOver(backend.name, reason, backend.is_for(call)))
        choices.append(Choice(operation.name, chosen.name, tuple(passed_over)))
    return choices


def training_call(
    operation: Operation, device: torch.device, dtype: torch.dtype, documents: bool
) -> Call:
    """Return what a training step asks of an operation."""
    needs = {"documents"} if documents and operation.name in AWARE_OF_DOCUMENTS else set()
    return Call(device.type, operation.dtype or dtype, frozenset(needs))


def describe(choices: list[Choice]) -> list[str]:
    """Return lines for the start of a run; those for other devices and dtypes go without saying."""
    lines = [", ".join(f"{choice.operation} {choice.backend}" for choice in choices)]
    for choice in choices:
        lines += [
            f"{choice.operation}: {other.backend} is not used: {other.reason}"
            for other in choice.passed_over
            if other.runs_here
        ]
    return lines
