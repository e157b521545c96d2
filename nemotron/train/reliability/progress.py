"""The progress of this process, for threads that watch it."""

import time
from dataclasses import dataclass
from functools import cached_property

import torch

from nemotron.device import Mark, mark, seconds_between

PHASES = (
    "start",
    "data",
    "wait",
    "forward_backward",
    "exchange",
    "optimizer",
    "profile",
    "evaluate",
    "save",
    "restore",
)
"""Parts of a run, in the order in which they come within a step."""

RARE = ("start", "profile", "evaluate", "save", "restore")
"""Those that may take longer than any part of a step."""


@dataclass(frozen=True)
class StepPhase:
    """A part of a step (its index; -1 before the first), and when it began or last moved on."""

    step: int
    phase: str
    since: float

    @property
    def order(self) -> tuple[int, int]:
        """Sorts phases as a run comes to them."""
        return self.step, PHASES.index(self.phase)


class StepProgress:
    """Written by the main thread; one assignment, so that a reader sees all of it or nothing."""

    def __init__(self) -> None:
        self.current = StepPhase(-1, "start", time.monotonic())
        self.first_step: int | None = None

    def enter(self, step: int, phase: str) -> None:
        """Begin a part of a step."""
        if phase == "data" and self.first_step is None:
            self.first_step = step
        self.current = StepPhase(step, phase, time.monotonic())

    def move(self) -> None:
        """Note that the same part continues, with another micro-batch."""
        self.current = StepPhase(self.current.step, self.current.phase, time.monotonic())

    @property
    def is_rare(self) -> bool:
        """Whether it may take longer now than in other steps: the first one compiles and opens."""
        return self.current.phase in RARE or self.current.step == self.first_step


class Stopwatch:
    """Seconds of each part of a step: of the device's time, without making the host wait for it."""

    def __init__(self, device: torch.device, progress: StepProgress, step: int) -> None:
        self._device, self._progress, self._step = device, progress, step
        self._parts: list[tuple[str | None, Mark]] = []

    def begin(self, part: str | None) -> None:
        """End the part so far and begin another, if any."""
        self._parts.append((part, mark(self._device)))
        if part is not None:
            self._progress.enter(self._step, part)

    @cached_property
    def seconds(self) -> dict[str, float]:
        """By part, to be read when the last one has ended; waits until the device is there, too."""
        marks = [at for _, at in self._parts]
        named = zip(self._parts, seconds_between(marks), strict=False)
        return {part: seconds for (part, _), seconds in named if part is not None}
