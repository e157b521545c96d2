"""The batches of the next steps, read while a step is computed."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from nemotron.data.batch import Batch


class Prefetcher:
    """Answers for one step after the other, reading `depth` steps ahead in a thread of its own.

    Reading lets other threads run, because most of it is copying out of mapped files. There is
    nothing to save: asked for any step, it goes on from there.
    """

    def __init__(self, read: Callable[[int], Batch], *, depth: int, num_steps: int) -> None:
        """Take what reads a step; no step from `num_steps` on is read ahead."""
        self._read, self._depth, self._num_steps = read, depth, num_steps
        self._pool = ThreadPoolExecutor(1, "rows")
        self._ahead: deque[tuple[int, Future[Batch]]] = deque()

    def take(self, step: int) -> Batch:
        """Return the rows of a step; whatever was wrong with reading them is raised here."""
        while self._ahead and self._ahead[0][0] != step:
            self._ahead.popleft()[1].cancel()
        first = self._ahead[-1][0] + 1 if self._ahead else step
        last = max(step + 1, min(step + 1 + self._depth, self._num_steps))
        for number in range(first, last):
            self._ahead.append((number, self._pool.submit(self._read, number)))
        return self._ahead.popleft()[1].result()
