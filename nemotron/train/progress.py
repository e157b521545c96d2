"""Where this process stands, for whoever watches it from another thread."""

import time
from dataclasses import dataclass

PHASES = (
    "start",
    "data",
    "wait",
    "forward_backward",
    "exchange",
    "optimizer",
    "evaluate",
    "save",
    "restore",
)
"""Parts of a run, in the order in which they come within a step."""

RARE = ("start", "evaluate", "save", "restore")
"""Those that may take longer than any part of a step."""


@dataclass(frozen=True)
class Place:
    """A part of a step (its index; -1 before the first), and when it began or last moved on."""

    step: int
    phase: str
    since: float

    @property
    def order(self) -> tuple[int, int]:
        """Sorts places as a run comes to them."""
        return self.step, PHASES.index(self.phase)


class Progress:
    """Written by the main thread; one assignment, so that a reader sees all of it or nothing."""

    def __init__(self) -> None:
        self.place = Place(-1, "start", time.monotonic())
        self.first_step: int | None = None

    def enter(self, step: int, phase: str) -> None:
        """Begin a part of a step."""
        if phase == "data" and self.first_step is None:
            self.first_step = step
        self.place = Place(step, phase, time.monotonic())

    def move(self) -> None:
        """Say that the same part goes on: another micro-batch, another portion."""
        self.place = Place(self.place.step, self.place.phase, time.monotonic())

    @property
    def is_rare(self) -> bool:
        """Whether it may take longer now than in other steps: the first one compiles and opens."""
        return self.place.phase in RARE or self.place.step == self.first_step
