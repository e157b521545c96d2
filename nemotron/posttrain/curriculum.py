"""Which levels and tasks a run asks more often: those that are solved neither always nor never."""

import json
import random
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import xxhash
from pydantic import Field, ValidationError

from nemotron.checkpoint.records import explain
from nemotron.posttrain.config import CurriculumConfig, RolloutConfig
from nemotron.posttrain.environments.base import Row
from nemotron.section import Section

Rate = Annotated[float, Field(ge=0, le=1)]

REMEMBERED = 100_000
"""Tasks whose pass rate is kept; the one asked longest ago is forgotten."""


class SavedCurriculum(Section):
    """What the state of a checkpoint holds of it."""

    levels: dict[str, list[tuple[float, list[Rate]]]]
    """By environment: each level with the pass rates of its newest tasks."""
    tasks: list[tuple[str, Rate]]
    """The one asked longest ago first."""


class Curriculum:
    """Pass rates of a run so far: of each level of its environments, and of each task.

    An environment begins at the level of the recipe. When the newest level is solved often enough
    the next one is added; older levels stay, with a weight that falls as they become easy.
    """

    def __init__(
        self, config: CurriculumConfig, rollout: RolloutConfig, highest: Mapping[str, int]
    ) -> None:
        """`highest` is the highest level that the tasks of each environment have."""
        self._config = config
        self._highest = {title: min(own, config.max_level) for title, own in highest.items()}
        self._levels: dict[str, dict[float, deque[float]]] = {
            entry.title: {entry.level: self._window()} for entry in rollout.environments
        }
        self._tasks: OrderedDict[str, float] = OrderedDict()

    def level(self, environment: str, rng: random.Random) -> float:
        """Draw the level of a task."""
        levels = self._levels[environment]
        weights = [self._weight(_mean(passed)) for passed in levels.values()]
        return rng.choices(list(levels), weights)[0]

    def accepts(self, row: Row, rng: random.Random) -> bool:
        """Say whether a task is asked, at random by its pass rate; new ones always are."""
        return rng.random() < self._weight(self._tasks.get(_key(row)))

    def learn(self, environment: str, level: float, row: Row, pass_rate: float) -> None:
        """Take the mean reward of the answers to a task, between 0 and 1, into account."""
        pass_rate = min(max(pass_rate, 0.0), 1.0)
        key = _key(row)
        self._tasks[key] = pass_rate
        self._tasks.move_to_end(key)
        if len(self._tasks) > REMEMBERED:
            self._tasks.popitem(last=False)
        levels = self._levels[environment]
        levels[level].append(pass_rate)
        newest, next_ = max(levels), max(levels) + self._config.step
        is_known = len(levels[newest]) == self._config.window
        if is_known and next_ <= self._highest[environment]:
            rate = _mean(levels[newest])
            if rate is not None and rate >= self._config.raise_at:
                levels[next_] = self._window()

    def metrics(self) -> dict[str, float]:
        """Return the newest level of each environment."""
        return {f"rl/level/{name}": max(levels) for name, levels in self._levels.items()}

    def state(self) -> dict[str, Any]:  # Any: nested JSON
        """Return what a checkpoint holds of it."""
        return {
            "levels": {
                name: [[level, list(passed)] for level, passed in levels.items()]
                for name, levels in self._levels.items()
            },
            "tasks": [list(each) for each in self._tasks.items()],
        }

    def restore(self, saved: Any) -> None:  # Any: what stands in a file
        """Go on from a `state`.

        Raises:
            ValueError: when it is of other environments, or damaged.
        """
        try:
            found = SavedCurriculum.model_validate_json(json.dumps(saved))
        except ValidationError as error:
            raise ValueError(f"the curriculum is damaged: {explain(error)}") from None
        levels = {
            name: {level: self._window(passed) for level, passed in known}
            for name, known in found.levels.items()
        }
        if levels.keys() != self._levels.keys() or not all(levels.values()):
            raise ValueError("the curriculum is of other environments")
        self._levels = levels
        self._tasks = OrderedDict(found.tasks)

    def _window(self, passed: Sequence[float] = ()) -> deque[float]:
        return deque(map(float, passed), maxlen=self._config.window)

    def _weight(self, pass_rate: float | None) -> float:
        """Return 1 for what is unknown or solved half the time, less the surer the outcome."""
        if pass_rate is None:
            return 1.0
        return max(self._config.least_weight, 4 * pass_rate * (1 - pass_rate))


def _key(row: Row) -> str:
    return xxhash.xxh64(json.dumps(row, sort_keys=True).encode(errors="replace")).hexdigest()


def _mean(passed: Sequence[float] | deque[float]) -> float | None:
    return sum(passed) / len(passed) if passed else None
