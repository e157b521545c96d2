"""The least time that a device needs for a problem, and the score of a measured time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from nemotron.sol.problems import Problem

Binds = Literal["memory", "compute"]


@dataclass(frozen=True)
class Pass:
    """What forward or backward must at least compute and move."""

    flops: float
    bytes: int


@dataclass(frozen=True)
class Roofs:
    """Rates that a device reaches: FLOP/s in one dtype and bytes/s."""

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Bound:
    """The least seconds of forward and backward together, and what takes most of them."""

    seconds: float
    binds: Binds


def compulsory(
    problem: Problem, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> tuple[Pass, Pass]:
    """Count forward and backward as one pass each, with nothing written but results.

    Forward reads its inputs and writes its outputs, but for an input that it hands on. Backward
    reads the outputs' gradients and, where it needs them, the inputs, and writes the gradients of
    those that are numbers.
    """
    everything = sum(t.nbytes for t in inputs)
    numbers = sum(t.nbytes for t in inputs if t.is_floating_point())
    read_again = everything if problem.reads_again else everything - numbers
    found, given = sum(t.nbytes for t in outputs), {t.data_ptr() for t in inputs}
    written = sum(t.nbytes for t in outputs if t.data_ptr() not in given)
    forward = Pass(problem.flops, everything + written)
    backward = Pass(problem.again * problem.flops, read_again + found + numbers)
    return forward, backward


def bound(passes: Sequence[Pass], roofs: Roofs) -> Bound:
    """Return the sum over passes of the longer of computing and moving."""
    times = [(p.flops / roofs.flops, p.bytes / roofs.bandwidth) for p in passes]
    computing, moving = (sum(part) for part in zip(*times, strict=True))
    binds: Binds = "compute" if computing > moving else "memory"
    return Bound(sum(max(pair) for pair in times), binds)


def score(seconds: float, reference: float, least: float) -> float:
    """Return 1 for the bound, 0.5 for the time of the reference, less for what is slower.

    Source: NVIDIA/SOL-ExecBench: sol_score.py.
    """
    return 1 / (1 + (seconds - least) / max(reference - least, 1e-12))
