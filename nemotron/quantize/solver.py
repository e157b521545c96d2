"""The best choice of one option for each group, at every budget: an exact Pareto frontier.

Partial choices that cost more and lose more than another one can be part of no best choice, so they
are dropped group after group (Nemhauser and Ullmann 1969). What is left is the whole frontier.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Option:
    """What one choice for a group costs, and loses."""

    cost: int
    loss: float


@dataclass(frozen=True)
class _Stage:
    """The undominated choices for the first groups, by ascending cost."""

    costs: npt.NDArray[np.int64]
    losses: npt.NDArray[np.float64]
    parents: npt.NDArray[np.int64]
    """Where each is in the stage before."""
    chosen: npt.NDArray[np.int64]
    """The option of the last group."""


class Frontier:
    """All choices that no other one beats in cost and in loss."""

    def __init__(self, groups: Sequence[Sequence[Option]]) -> None:
        zero = np.zeros(1, np.int64)
        self._stages = [_Stage(zero, np.zeros(1), zero, zero)]
        for options in groups:
            self._stages.append(_extend(self._stages[-1], options))

    @property
    def costs(self) -> npt.NDArray[np.int64]:
        """Ascending."""
        return self._stages[-1].costs

    @property
    def losses(self) -> npt.NDArray[np.float64]:
        """Descending."""
        return self._stages[-1].losses

    def within(self, budget: int) -> int | None:
        """Return the place of the smallest loss whose cost is within a budget; None if none is."""
        place = int(np.searchsorted(self.costs, budget, side="right")) - 1
        return place if place >= 0 else None

    def choice(self, place: int) -> list[int]:
        """Return the option of each group at a place of the frontier."""
        found = []
        for stage in reversed(self._stages[1:]):
            found.append(int(stage.chosen[place]))
            place = int(stage.parents[place])
        return found[::-1]


def _extend(stage: _Stage, options: Sequence[Option]) -> _Stage:
    costs = np.concatenate([stage.costs + option.cost for option in options])
    losses = np.concatenate([stage.losses + option.loss for option in options])
    order = np.lexsort((losses, costs))
    sorted_losses = losses[order]
    before = np.concatenate([[np.inf], np.minimum.accumulate(sorted_losses)[:-1]])
    kept = order[sorted_losses < before]
    size = len(stage.costs)
    return _Stage(costs[kept], losses[kept], kept % size, kept // size)
