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
    """The backend of one operation, and the reason against each that would come before it."""

    operation: str
    backend: str
    passed_over: dict[str, str]


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
        passed_over = {}
        for backend in operation.backends:
            if backend is chosen:
                break
            passed_over[backend.name] = backend.unfit(call) or "the recipe names another one"
        choices.append(Choice(operation.name, chosen.name, passed_over))
    return choices


def training_call(
    operation: Operation, device: torch.device, dtype: torch.dtype, documents: bool
) -> Call:
    """Return what a training step asks of an operation."""
    needs = {"documents"} if documents and operation.name in AWARE_OF_DOCUMENTS else set()
    return Call(device.type, dtype, frozenset(needs))


def describe(choices: list[Choice], device: torch.device) -> list[str]:
    """Return lines for the start of a run; backends for other devices go without saying."""
    lines = [", ".join(f"{choice.operation} {choice.backend}" for choice in choices)]
    for choice in choices:
        for name, reason in choice.passed_over.items():
            if f"not on {device.type}" not in reason:
                lines.append(f"{choice.operation}: {name} is not used: {reason}")
    return lines
