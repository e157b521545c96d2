"""Which blocks of the keys' and values' memory are in use, and by how many rows."""

import heapq


class OutOfBlocks(RuntimeError):
    """No block is free; the caller frees a row and tries again."""


class Blocks:
    """Numbers of equal blocks of memory, given out one by one and counted while they are shared.

    Without a limit, `count` doubles when the blocks run out.
    """

    def __init__(self, limit: int | None = None, first: int = 8) -> None:
        self.limit = limit
        self.count = first if limit is None else limit
        self._users = [0] * self.count
        self._free = list(range(self.count))
        """A heap; numbers that were taken out of their turn stay in it."""
        self.used = 0

    @property
    def num_free(self) -> int | None:
        """Blocks that can still be taken; None without a limit."""
        return None if self.limit is None else self.limit - self.used

    def take(self, after: int | None = None) -> int:
        """Return a free block: the one after `after` if possible, else the lowest.

        Blocks that follow each other can be read without a copy.

        Raises:
            OutOfBlocks: when the limit is reached.
        """
        if self.used == self.count:
            self._grow()
        block = -1 if after is None else after + 1
        if not 0 <= block < self.count or self._users[block]:
            block = heapq.heappop(self._free)
            while self._users[block]:
                block = heapq.heappop(self._free)
        self._users[block] = 1
        self.used += 1
        return block

    def share(self, block: int) -> None:
        """Count one more user of a block."""
        self._users[block] += 1

    def release(self, block: int) -> None:
        """Count one user less; a block without users is free again."""
        self._users[block] -= 1
        assert self._users[block] >= 0, f"block {block} was released more often than taken"
        if not self._users[block]:
            heapq.heappush(self._free, block)
            self.used -= 1

    def is_shared(self, block: int) -> bool:
        """Say whether a block has several users, so that none of them may write into it."""
        return self._users[block] > 1

    def _grow(self) -> None:
        if self.limit is not None:
            raise OutOfBlocks(f"all {self.limit} blocks of the cache are in use")
        more = range(self.count, 2 * self.count)
        self._users += [0] * len(more)
        for block in more:
            heapq.heappush(self._free, block)
        self.count = more.stop
