"""Validation loss of averages over several windows and shapes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from nemotron.device import find_device
from nemotron.errors import UserError
from nemotron.merge.average import Average
from nemotron.merge.coefficients import Shape, coefficients
from nemotron.merge.window import Window
from nemotron.parallel.runtime import Ranks
from nemotron.train.config import TextConfig
from nemotron.train.pretraining import open_data
from nemotron.train.schedule import plan_training
from nemotron.train.trainer import build_local
from nemotron.train.validation import evaluate


@dataclass(frozen=True)
class Candidate:
    """An average of checkpoints; of one alone if the shape is None."""

    window: Window
    shape: Shape | None

    def average(self, ema_decay: float) -> Average:
        """Return the average, of which nothing is computed yet."""
        if self.shape is None:
            return Average(self.window, [1.0])
        tokens = [one.tokens for one in self.window]
        return Average(self.window, coefficients(self.shape, tokens, ema_decay))

    def __str__(self) -> str:
        if self.shape is None:
            return f"step {self.window[-1].step} alone"
        steps = f"steps {self.window[0].step} to {self.window[-1].step}"
        return f"{self.shape} over {len(self.window)} checkpoints, {steps}"


class Validation:
    """The held-out text of a run, and a model that takes the weights to be compared."""

    def __init__(self, config: TextConfig, device: str) -> None:
        """Open the text and build the model.

        Raises:
            UserError: when the recipe's data are not there, or nothing of them is held out.
        """
        # one process validates, whatever layout the run was trained in
        config = config.model_copy(update={"parallel": type(config.parallel)()})
        self._config = config
        self._data = open_data(config, plan_training(config))
        if not self._data.validation_domains:
            raise UserError(
                "leaves no text to choose a window by; leave out --search.",
                key="data.validation_fraction",
                value=config.data.validation_fraction,
            )
        self._ranks = Ranks()
        self._local = build_local(config, find_device(device), self._ranks)

    def loss(self, average: Average) -> float:
        """Return the loss per held-out token, in nats."""
        [model] = self._local.models
        average.load(model)
        metrics = evaluate(
            self._local,
            self._data,
            self._ranks,
            tokens=self._config.evaluation.tokens,
            rows=self._config.batch.micro_batch,
        )
        return metrics["validation/loss"]


def candidates(windows: Iterable[Window], shapes: Iterable[Shape]) -> Iterator[Candidate]:
    """Yield the newest checkpoint alone, then every window in every shape."""
    windows = list(windows)
    yield Candidate(windows[0][-1:], None)
    shapes = list(shapes)
    for window in windows:
        for shape in shapes:
            yield Candidate(window, shape)
