"""Rollouts that are written while the batch before them is learned from."""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from nemotron.parallel.runtime import Ranks
from nemotron.posttrain.rollout import Rollout

NUMBER, ROLLOUTS = "number", "rollouts"
"""Keys of the state: number of the batch, and its rollouts."""


class RolloutsAhead:
    """The rollouts of one later batch, which a thread of each rank writes.

    All ranks call each method together, so that each of them gets the rollouts of all.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._pending: Future[list[Rollout]] | None = None
        self._number: int | None = None
        self._rollouts: list[Rollout] = []

    def begin(self, number: int, write: Callable[[], list[Rollout]]) -> None:
        """Let the thread write this rank's rollouts of a batch, with weights that stay."""
        self._number, self._rollouts = number, []
        self._pending = self._thread.submit(write)

    def take(self, number: int) -> list[Rollout] | None:
        """Return the rollouts of this batch once they are there; None if it was not begun."""
        if number != self._number:
            return None
        found = self._settle()
        self._number, self._rollouts = None, []
        return found

    def state(self) -> dict[str, Any]:  # Any: nested JSON
        """Return what `restore` reads; waits until all is written."""
        rollouts = [json.loads(rollout.as_line()) for rollout in self._settle()]
        return {NUMBER: self._number, ROLLOUTS: rollouts}

    def restore(self, number: int | None, rollouts: Sequence[Rollout]) -> None:
        """Take rollouts that were written before."""
        self._pending, self._number, self._rollouts = None, number, list(rollouts)

    def wait(self) -> None:
        """Return when the thread is idle, so that models and verifiers are free."""
        self._settle()

    def close(self) -> None:
        """End the thread, once it has written what it writes."""
        self._thread.shutdown(cancel_futures=True)

    def _settle(self) -> list[Rollout]:
        if self._pending is not None:
            own, self._pending = self._pending.result(), None
            self._rollouts = by_group(self._ranks.gather(own))
        return self._rollouts


def by_group(parts: Sequence[Sequence[Rollout]]) -> list[Rollout]:
    """Return the rollouts of all ranks in the order of their prompts."""
    return sorted((r for part in parts for r in part), key=lambda rollout: rollout.group)
