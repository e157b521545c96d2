"""Faults that a recipe asks for, so that tests can see what becomes of a run that meets them."""

import logging
import os
import signal
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nemotron.errors import UserError
from nemotron.parallel.local import LocalModel
from nemotron.parallel.shards import local_of
from nemotron.train.config import FaultConfig

SPIKE_FACTOR = 300.0
"""The hidden states before the head are multiplied by it: far beyond what training does."""

FLIPPED = 1 << 22
"""The highest bit of a float32's fraction: it changes a number by half at most, and is not lost
in the rounding of the next update."""

log = logging.getLogger(__name__)


class InjectedFault(RuntimeError):
    """What a fault of kind `raise` raises."""


class Faults:
    """The faults of one rank."""

    def __init__(self, faults: Sequence[FaultConfig], rank: int) -> None:
        self._own = [fault for fault in faults if fault.rank in (None, rank)]

    def strike(self, step: int, local: LocalModel) -> None:
        """Let happen what is due in the step of this index: with its rows read, before forward."""
        for fault in self._own:
            if fault.step <= step + 1 <= (fault.last_step or fault.step):
                _strike(fault, local)


def describe(fault: FaultConfig) -> str:
    """Say in a few words what will happen."""
    last = f" to {fault.last_step}" if fault.last_step else ""
    who = "all ranks" if fault.rank is None else f"rank {fault.rank}"
    return f"{fault.kind} in step {fault.step}{last} on {who}"


def _strike(fault: FaultConfig, local: LocalModel) -> None:
    match fault.kind:
        case "nan_gradient":
            _multiply_output(_norms(local)[0], float("nan"))
        case "spike":
            _multiply_output(_norms(local)[-1], SPIKE_FACTOR)
        case "sleep":
            time.sleep(fault.seconds)
        case "hang":
            log.warning("hanging, as the recipe asks")
            while True:
                time.sleep(1.0)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "raise":
            raise InjectedFault("injected, as the recipe asks")
        case "flip_bit":
            _flip_bit(_tensor(fault, local))


def _norms(local: LocalModel) -> list[nn.Module]:
    """Return the norms of this rank's last stage, in the order in which the model calls them."""
    backbone = local.models[-1].backbone
    norms = [block.get_submodule("norm") for block in backbone.layers.children()]
    return [*norms, *([backbone.norm_f] if backbone.norm_f is not None else [])]


def _multiply_output(module: nn.Module, factor: float) -> None:
    """Change what the module returns next, once, before gradients of ranks are added up."""

    def change(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        handle.remove()
        return output * factor

    handle = module.register_forward_hook(change)


@torch.no_grad()
def _flip_bit(tensor: Tensor) -> None:
    bits = local_of(tensor).view(torch.int32)
    bits[(0,) * bits.ndim] ^= FLIPPED


def _tensor(fault: FaultConfig, local: LocalModel) -> Tensor:
    tensors: dict[str, Tensor] = {**local.parameters(), **local.buffers()}
    name = fault.tensor or next(iter(tensors))
    if name not in tensors:
        rule = f"is not held by rank {fault.rank}."
        raise UserError(rule, key="tensor", value=name, where="reliability.faults")
    return tensors[name]
