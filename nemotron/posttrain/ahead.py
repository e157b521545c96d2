"""Rollouts that are written while the batch before them is learned from."""

import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from nemotron.model.hybrid import HybridLM
from nemotron.parallel.runtime import Ranks
from nemotron.posttrain.paused import PausedAnswers
from nemotron.posttrain.rollout import Draft, Rollout, Sampler

NUMBER, ROLLOUTS, PAUSED = "number", "rollouts", "paused"
"""Keys of the state: number of the batch, its rollouts, and answers that wait for new weights."""


class RolloutsAhead:
    """The rollouts of one later batch, which a thread of each rank writes.

    All ranks call each method together, so that each of them gets the rollouts of all.
    """

    def __init__(self, ranks: Ranks, sampler: Sampler, paused: PausedAnswers) -> None:
        self._ranks, self._sampler, self._paused = ranks, sampler, paused
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._pending: Future[list[Rollout]] | None = None
        self._draft: Draft | None = None
        """What this rank has written of the batch and goes on with later."""
        self.number: int | None = None
        """Of the batch; None if there is none."""
        self._rollouts: list[Rollout] = []

    def begin(
        self, number: int, draft: Draft, model: HybridLM, version: int, until: int | None
    ) -> None:
        """Let the thread write this rank's rollouts of a batch; `until` as of `go_on`."""
        self.number, self._draft, self._rollouts = number, draft, []
        self.go_on(model, version, until)

    def go_on(self, model: HybridLM, version: int, until: int | None) -> None:
        """Let the thread go on with these weights, which must stay as they are.

        Until each answer has so many sampled tokens, or else to the end, and to the verdicts.
        """
        self.wait()
        draft = self._draft
        assert draft is not None, "no answer waits"

        def write() -> list[Rollout]:
            self._sampler.write(draft, model, version, until)
            return [] if until is not None else self._sampler.judge(draft)

        if until is None:
            self._draft = None
        self._pending = self._thread.submit(write)

    def take(self, number: int) -> list[Rollout] | None:
        """Return the rollouts of this batch once they are there; None if it was not begun."""
        if number != self.number:
            return None
        found = self._settle()
        self.number, self._rollouts = None, []
        return found

    def state(self) -> dict[str, Any]:  # Any: nested JSON
        """Return what `restore` reads; waits until all is written.

        Answers that wait for new weights are read again from their prompts, here and there alike.
        """
        rollouts = [json.loads(rollout.as_line()) for rollout in self._settle()]
        found = {NUMBER: self.number, ROLLOUTS: rollouts}
        if self._draft is not None:
            self._draft.answerer = None
            parts = self._ranks.gather(self._paused.save(self._draft))
            found[PAUSED] = [answer for part in parts for answer in part]
        return found

    def restore(
        self, number: int | None, rollouts: Sequence[Rollout], draft: Draft | None = None
    ) -> None:
        """Take rollouts that were written before, or what this rank had written of them."""
        self._pending, self.number, self._rollouts = None, number, list(rollouts)
        self._draft = draft

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
