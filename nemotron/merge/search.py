"""Averages over several windows and in several shapes, to be compared."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from nemotron.merge.average import Average
from nemotron.merge.coefficients import Shape, coefficients
from nemotron.merge.window import Window


@dataclass(frozen=True)
class Candidate:
    """An average of checkpoints, or a single one if the shape is None."""

    window: Window
    shape: Shape | None

    def average(self, ema_decay: float) -> Average:
        """Return the average, which reads its tensors when they are asked for."""
        if self.shape is None:
            return Average(self.window, [1.0])
        tokens = [one.tokens for one in self.window]
        return Average(self.window, coefficients(self.shape, tokens, ema_decay))

    def __str__(self) -> str:
        if self.shape is None:
            return f"step {self.window[-1].step} alone"
        steps = f"steps {self.window[0].step} to {self.window[-1].step}"
        return f"{self.shape} over {len(self.window)} checkpoints, {steps}"


def candidates(windows: Iterable[Window], shapes: Iterable[Shape]) -> Iterator[Candidate]:
    """Yield the newest checkpoint by itself, then every window in every shape."""
    windows = list(windows)
    yield Candidate(windows[0][-1:], None)
    shapes = list(shapes)
    for window in windows:
        for shape in shapes:
            yield Candidate(window, shape)
