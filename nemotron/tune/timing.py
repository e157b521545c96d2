"""Take a launch out of its operation and time it on the device; compare what operations return."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nemotron.ops.tuning.base import Binds
from nemotron.ops.tuning.tunable import Configuration
from nemotron.tune.compiled import launches_replaced
from nemotron.tune.problems import Draw, Run, Target

SETS = 2
"""Inputs that take turns, so that no repetition finds those of the one before in a cache."""
FLUSHED_BYTES = 128 << 20
"""Written before each repetition: more than twice the 50 to 60 MB of cache of a Hopper GPU."""
CYCLES_PER_LAUNCH = 400_000
"""The device is held back by so many for each launch while the host queues them: about 0.2 ms."""
TOLERANCE = 5e-3
"""Of results in bfloat16 whose float32 sums were added in another order: few differ by a bit."""
SHORT_US = 5.0
"""A launch that cannot take longer is bound by latency."""


class NotLaunched(Exception):
    """Says that an operation does without a launch at these sizes."""


@dataclass
class Timed:
    """A candidate on the device."""

    configuration: Configuration
    launches: list[Callable[[], None]]
    """One for each set of inputs."""
    error: float
    asked: tuple[Any, ...]
    """Device, dtype and buckets for which the launch was looked up."""
    bytes: float
    calls: int = 1
    """Kernels that one repetition launches."""
    times_us: list[float] = field(default_factory=list)

    @property
    def us(self) -> float:
        """The median time."""
        return statistics.median(self.times_us)

    @property
    def spread_us(self) -> float:
        """Half of how far apart the middle half of the times is."""
        if len(self.times_us) < 4:
            return 0.0
        low, _, high = statistics.quantiles(self.times_us, n=4)
        return (high - low) / 2


class Timer:
    """Times launches of one target at a time on a device, whose rates it measures first.

    On a CPU, where kernels are interpreted, times mean nothing; all else is as on a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._is_gpu = device, device.type == "cuda"
        self.name = torch.cuda.get_device_name(device) if self._is_gpu else "interpreter"
        size = FLUSHED_BYTES if self._is_gpu else 1
        self._flushed = torch.empty(size, dtype=torch.int8, device=device)
        self._runs: list[Run] = []
        self._exact: Sequence[Tensor] = ()
        self._target: Target | None = None
        self._default: Configuration = {}
        self.bandwidth, self.flops = self._rates()

    def begin(self, target: Target) -> Timed:
        """Draw a target's inputs and keep the default's results; return the default."""
        self.end()
        self._target = target
        self._runs = [target.problem.draw(target.sizes, Draw(self.device, n)) for n in range(SETS)]
        default = target.tunable.default(_dtype_of(target, self._runs[0]))
        self._default = default
        with target.tunable.forced(default):
            self._exact = [t.clone() for t in self._runs[0]()]
        return self.capture(default)

    def end(self) -> None:
        """Free the target's memory."""
        self._target, self._runs, self._exact = None, [], ()
        if self._is_gpu:
            torch.cuda.empty_cache()

    def capture(self, configuration: Configuration) -> Timed:
        """Run the operation with a candidate; keep its launches, and how wrong its results are.

        Raises:
            RuntimeError: of Triton's or CUDA's, when it cannot be launched.
        """
        target = self._target
        assert target is not None
        launches, moved, error = [], 0.0, 0.0
        for number, run in enumerate(self._runs):
            calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

            def keep(
                kernel: Any,
                *arguments: Any,
                calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = calls,
                **keywords: Any,
            ) -> Any:
                if kernel in target.tunable.kernels:
                    calls.append((kernel, arguments, keywords))
                return launch(kernel, *arguments, **keywords)

            with launches_replaced(keep) as launch, target.tunable.forced(configuration) as asked:
                outputs = run()
            if number == 0:
                changed = {n for n, v in configuration.items() if v != self._default[n]}
                reordered = bool(changed & target.tunable.reorders)
                error = difference(outputs, self._exact, reordered)
                moved = float(sum(_bytes(call, target.problem.tensor_passes) for call in calls))
            launches.append(_replay(launch, calls))
        return Timed(configuration, launches, error, asked[0], moved, len(calls))

    def time(self, candidates: Sequence[Timed], repetitions: int) -> None:
        """Add times to each candidate's; they take turns."""
        if not self._is_gpu:
            repetitions = 2
        for candidate in candidates:
            candidate.launches[0]()  # loads the kernel
        marks = []
        if self._is_gpu:
            torch.cuda.synchronize()
            held = CYCLES_PER_LAUNCH * repetitions * sum(c.calls for c in candidates)
            torch.cuda._sleep(held)
        for number in range(repetitions):
            for candidate in candidates:
                self._flushed.zero_()
                first = self._mark()
                candidate.launches[number % SETS]()
                marks.append((candidate, first, self._mark()))
        if self._is_gpu:
            torch.cuda.synchronize()
        for candidate, first, last in marks:
            us = 1e3 * first.elapsed_time(last) if self._is_gpu else 1e6 * (last - first)
            candidate.times_us.append(us)

    def _mark(self) -> Any:
        """Return an event that was queued, or the time of a CPU."""
        if not self._is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def floor(self, timed: Timed) -> tuple[float, Binds]:
        """Return the microseconds that a launch must take, and what binds it."""
        target = self._target
        assert target is not None
        memory = 1e6 * timed.bytes / self.bandwidth
        rate = self.flops * (2 if target.problem.fp8 else 1)
        compute = 1e6 * target.problem.flops(target.sizes) / rate
        floor = max(memory, compute)
        if floor < SHORT_US:
            return floor, "latency"
        return floor, "memory" if memory > compute else "compute"

    def _rates(self) -> tuple[float, float]:
        """Measure bytes/s of a copy and FLOP/s of a product in bfloat16."""
        size, copied = (8192, 1 << 30) if self._is_gpu else (64, 1 << 12)
        source = torch.empty(copied, dtype=torch.int8, device=self.device).random_()
        target = torch.empty_like(source)
        a, b = (torch.randn(size, size, device=self.device).bfloat16() for _ in range(2))
        out = torch.empty_like(a)

        def copy_once() -> None:
            target.copy_(source)

        def multiply_once() -> None:
            torch.mm(a, b, out=out)

        copy, product = (
            Timed({}, [call] * SETS, 0.0, (), 0.0) for call in (copy_once, multiply_once)
        )
        self.time([copy, product], 8)
        return 2 * source.nbytes / copy.us * 1e6, 2 * size**3 / product.us * 1e6


def difference(found: Sequence[Tensor], exact: Sequence[Tensor], reordered: bool) -> float:
    """Return the largest difference in norm, relative; infinite where bits must agree."""
    worst = 0.0
    for a, b in zip(found, exact, strict=True):
        if a.element_size() == 1:  # codes
            a, b = a.view(torch.uint8), b.view(torch.uint8)
        if torch.equal(a, b):
            continue
        if not reordered:
            return float("inf")
        error = ((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-30)).item()
        worst = max(worst, error) if error == error else float("inf")
    return worst


def _dtype_of(target: Target, run: Run) -> torch.dtype:
    """Return the dtype for which the launch is looked up."""
    default = target.tunable.default(torch.bfloat16)
    with target.tunable.forced(default) as asked:
        run()
    if not asked:
        raise NotLaunched(f"{target.tunable.name} is not launched at these sizes")
    return asked[0][1]


def _replay(
    launch: Callable[..., Any], calls: Sequence[tuple[Any, tuple[Any, ...], dict[str, Any]]]
) -> Callable[[], None]:
    def again() -> None:
        for kernel, arguments, keywords in calls:
            launch(kernel, *arguments, **keywords)

    return again


def _bytes(call: tuple[Any, tuple[Any, ...], dict[str, Any]], passes: int) -> float:
    """Return the bytes of all tensors of a launch, each once, the largest as often as it moves."""
    _, arguments, keywords = call
    values = [getattr(value, "base", value) for value in (*arguments, *keywords.values())]
    sizes = {t.data_ptr(): t.numel() * t.element_size() for t in values if isinstance(t, Tensor)}
    return sum(sizes.values()) + (passes - 1) * max(sizes.values(), default=0)
