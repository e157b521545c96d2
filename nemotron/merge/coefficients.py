"""How much each checkpoint of a window counts: averages, and the emulation of a decay.

An average of checkpoints applies each update between two of them with a weight: that of all later
checkpoints together. So weights that fall as a learning rate would fall make the average of a
stable phase similar to the end of a decay that was never trained.

Source: WSM, arXiv 2507.17634; NVIDIA Nemotron 3 Super report, section 2.5.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

Shape = Literal["minus_sqrt", "linear", "uniform", "ema"]
SHAPES: tuple[Shape, ...] = ("minus_sqrt", "linear", "uniform", "ema")

EMA_DECAY = 0.8
"""Factor by which a checkpoint counts less than the next one (shape ema)."""


def coefficients(shape: Shape, tokens: Sequence[int], ema_decay: float = EMA_DECAY) -> list[float]:
    """Return the coefficient of each checkpoint, oldest first; their sum is 1.

    `tokens` has the tokens consumed at each checkpoint, which need not lie equally far apart.

    Raises:
        ValueError: when there are fewer than two checkpoints, or their tokens do not rise.
    """
    if len(tokens) < 2 or any(a >= b for a, b in pairwise(tokens)):
        raise ValueError("a window has at least two checkpoints, whose tokens rise")
    number = len(tokens)
    if shape == "uniform":
        return [1 / number] * number
    if shape == "ema":
        powers = [ema_decay**age for age in range(number)][::-1]
        return [power / sum(powers) for power in powers]
    span = tokens[-1] - tokens[0]
    places = [(at - tokens[0]) / span for at in tokens]
    of_updates = [1.0, *_means(INTEGRALS[shape], places), 0.0]
    return [before - after for before, after in pairwise(of_updates)]


INTEGRALS: dict[Shape, Callable[[float], float]] = {
    "minus_sqrt": lambda x: x - 2 / 3 * x**1.5,
    "linear": lambda x: x - x**2 / 2,
}
"""Of the decay from 1 to 0 over a window of length 1, from its begin to `x`."""


def _means(integral: Callable[[float], float], places: Sequence[float]) -> list[float]:
    """Return the mean of the decay over each interval between two checkpoints."""
    return [(integral(b) - integral(a)) / (b - a) for a, b in pairwise(places)]
