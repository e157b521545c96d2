"""Many requests, answered in their order, with a word now and then on how far the work is."""

import time
from collections.abc import Callable, Iterator, Sequence

from nemotron.generate.engine import Engine
from nemotron.generate.request import Answer, Request
from nemotron.terminal import say

AHEAD = 8
"""Answers that may be ahead of the oldest one that is not written yet, in slots of the engine."""
LINE_EVERY_S = 10.0


def answers_in_order(engine: Engine, requests: Sequence[Request]) -> Iterator[Answer]:
    """Yield the answer to each request in turn; the engine writes several at a time."""
    slots = len(engine.cache.lengths)
    written: dict[int, int] = {}
    """Places of the requests that the engine works on, by the number that it gave them."""
    ended: dict[int, Answer] = {}
    given = taken = 0
    try:
        while taken < len(requests):
            while given < min(len(requests), taken + AHEAD * slots) and len(written) < 2 * slots:
                written[engine.submit(requests[given])] = given
                given += 1
            for event in engine.step():
                if event.finish is not None:
                    ended[written.pop(event.request)] = event.answer
            while taken in ended:
                yield ended.pop(taken)
                taken += 1
    finally:
        for number in written:
            engine.cancel(number)


class BatchProgress:
    """Says now and then how many prompts are answered, and how long the rest takes."""

    def __init__(self, total: int, done: int, now: Callable[[], float] = time.monotonic) -> None:
        self._total, self._first, self._done, self._now = total, done, done, now
        self._tokens = 0
        self._start = self._last = now()

    def add(self, answer: Answer) -> None:
        """Count an answer."""
        self._done += 1
        self._tokens += len(answer.tokens)
        if self._now() - self._last >= LINE_EVERY_S:
            self.show()

    def show(self) -> None:
        """Say it at once."""
        self._last = self._now()
        seconds = max(self._last - self._start, 1e-9)
        left = (self._total - self._done) * seconds / max(self._done - self._first, 1)
        say(
            f"{self._done:,} of {self._total:,} prompts ({self._done / self._total:.0%}), "
            f"{self._tokens / seconds:,.1f} tokens/s, {left:,.0f} s left"
        )
