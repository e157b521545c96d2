"""One backend on one problem in a process of its own: checks results, and times repetitions."""

from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from nemotron.ops.apply import ALL
from nemotron.ops.registry import Backend, Operation
from nemotron.sol.bound import Pass, compulsory
from nemotron.sol.clock import Clock, Watch
from nemotron.sol.problems import Problem, Source, problems
from nemotron.sol.sizes import SIZES, Rows

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LINE = 64
"""Bytes of a line of a cache."""

Function = Callable[..., Any]  # Any: operations take and return different things


@dataclass(frozen=True)
class Candidate:
    """What a worker measures, by names, which every process understands."""

    operation: str
    label: str
    size: str
    rows: Rows
    dtype: str
    backend: str
    device: str
    threads: int

    @property
    def name(self) -> str:
        """Operation and label."""
        return f"{self.operation} {self.label}".rstrip()


@dataclass(frozen=True)
class Compulsory:
    """What a problem needs at least, and what the candidate's operations of torch moved."""

    passes: tuple[Pass, Pass]
    moved: int


@dataclass(frozen=True)
class Timed:
    """Seconds of a repetition, and which share of the cores other processes used meanwhile."""

    forward: float
    both: float
    others: float


@dataclass(frozen=True)
class Failed:
    """What a worker says in place of an answer."""

    reason: str


def find_operation(name: str) -> Operation:
    """Return an operation by its name."""
    return next(operation for operation in ALL if operation.name == name)


def find_problem(candidate: Candidate, rows: Rows) -> Problem:
    """Return the problem of a candidate at so many rows."""
    found = problems(SIZES[candidate.size], rows)
    return next(p for p in found if p.name == candidate.name)


def serve(connection: Connection, candidate: Candidate) -> None:
    """Answer (method, seed) until there is no more to answer."""
    torch.set_num_threads(candidate.threads)
    worker = Worker(candidate)
    while (request := connection.recv()) is not None:
        method, seed = request
        try:
            connection.send(getattr(worker, method)(seed))
        except Exception as problem:  # the starter decides what it means
            connection.send(Failed(f"{type(problem).__name__}: {problem}"))
    connection.close()


class Worker:
    """Draws inputs for one backend and calls it."""

    def __init__(self, candidate: Candidate) -> None:
        self._candidate = candidate
        self._device = torch.device(candidate.device)
        self._clock = Clock(self._device)
        operation = find_operation(candidate.operation)
        self._backend: Backend = operation.backend(candidate.backend)
        self._reference: Function = operation.backend("reference").function
        self._problem = find_problem(candidate, candidate.rows)
        self._slopes: list[Tensor] = []

    def check(self, seed: int) -> float:
        """Return the largest error in norm of output and gradients, against float64."""
        rows = SIZES[self._candidate.size].checked
        inputs, rest = self._draw(find_problem(self._candidate, rows), seed)
        exact = [t.detach().double() if t.is_floating_point() else t for t in inputs]
        exact = [t.requires_grad_(t.is_floating_point()) for t in exact]
        found = _results(self._backend.function, inputs, rest, seed)
        right = _results(self._reference, exact, rest, seed)
        return max(_error(ours, true) for ours, true in zip(found, right, strict=True))

    def count(self, seed: int) -> Compulsory:
        """Return what the problem needs, and what this backend moves for it."""
        from nemotron.sol.traffic import counted

        problem = self._problem
        inputs, rest = self._draw(problem, seed)
        with counted() as traffic:
            found = call(self._backend.function, inputs, rest)
            torch.autograd.backward(found, [torch.ones_like(y) for y in found])
        return Compulsory(compulsory(problem, inputs, found), traffic.bytes)

    def time(self, seed: int) -> Timed:
        """Time forward and backward once: fresh inputs at other addresses, nothing in a cache."""
        inputs, rest = self._draw(self._problem, seed)
        inputs = [_moved(tensor, seed) for tensor in inputs]
        slopes = self._slopes_of(inputs, rest)
        clock = self._clock
        clock.flush()
        clock.hold()
        with Watch() as watch:
            marks = [clock.mark()]
            found = call(self._backend.function, inputs, rest)
            marks.append(clock.mark())
            torch.autograd.backward(found, slopes)
            marks.append(clock.mark())
            clock.wait()
        for y in found:
            _must_be_plain(y)
        forward, backward = clock.milliseconds(marks)
        return Timed(forward / 1e3, (forward + backward) / 1e3, watch.others)

    def _draw(self, problem: Problem, seed: int) -> tuple[list[Tensor], tuple[object, ...]]:
        """Return inputs that ask for gradients, in their own memory layout, and the rest."""
        generator = torch.Generator(self._device).manual_seed(seed)
        inputs, rest = problem.draw(Source(generator, DTYPES[self._candidate.dtype]))
        return [t.detach().requires_grad_(t.is_floating_point()) for t in inputs], rest

    def _slopes_of(self, inputs: list[Tensor], rest: tuple[object, ...]) -> list[Tensor]:
        """Return gradients for the outputs, drawn once."""
        if not self._slopes:
            found = call(self._backend.function, inputs, rest)
            self._slopes = [torch.randn_like(y) for y in found]
        return self._slopes


def _moved(tensor: Tensor, seed: int) -> Tensor:
    """Copy a tensor, with its strides, to an address that depends on the seed."""
    reach = 1 + sum(
        (n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    shift = seed % 16 * (LINE // tensor.element_size())
    room = tensor.new_zeros(reach + shift)
    copy = room.as_strided(tensor.shape, tensor.stride(), shift).copy_(tensor.detach())
    return copy.requires_grad_(tensor.requires_grad)


def call(function: Function, inputs: list[Tensor], rest: tuple[object, ...]) -> list[Tensor]:
    """Call a backend; of several results return those that have gradients."""
    found = function(*inputs, *rest)
    return [y for y in found if y.requires_grad] if isinstance(found, tuple) else [found]


def _must_be_plain(y: Tensor) -> None:
    """Refuse what could compute its numbers later, when no clock runs."""
    if type(y) is not Tensor:
        raise TypeError(f"the result is a {type(y).__name__}, not a plain tensor")


def _results(
    function: Function, inputs: list[Tensor], rest: tuple[object, ...], seed: int
) -> list[Tensor]:
    """Return the outputs and the gradient of every input that has one."""
    found = call(function, inputs, rest)
    generator = torch.Generator(inputs[0].device).manual_seed(seed)
    drawn = [torch.randn(y.shape, generator=generator, device=y.device) for y in found]
    # both sides get the same numbers, which bfloat16 holds
    slopes = [slope.to(torch.bfloat16).to(y.dtype) for slope, y in zip(drawn, found, strict=True)]
    torch.autograd.backward(found, slopes)
    return [*(y.detach() for y in found), *(t.grad for t in inputs if t.grad is not None)]


def _error(ours: Tensor, true: Tensor) -> float:
    """Return the relative difference in norm; infinite for what is not a number."""
    found = ((ours.double() - true).norm() / true.norm().clamp_min(1e-30)).item()
    return found if found == found else float("inf")
