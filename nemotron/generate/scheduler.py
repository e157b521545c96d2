"""Which samples have a slot of the cache: they wait in order of arrival, the oldest first."""

import bisect

from nemotron.generate.prefixes import PrefixStore
from nemotron.generate.sample import Sample
from nemotron.model.cache import Cache


class Scheduler:
    """Gives samples slots and blocks, and takes them from the youngest when blocks run out.

    A sample that lost its place is read again from its tokens when it gets another.
    """

    def __init__(self, cache: Cache, prefixes: PrefixStore) -> None:
        self._cache, self._prefixes = cache, prefixes
        self.waiting: list[Sample] = []
        self.running: list[Sample] = []
        """Both in the order of arrival."""
        self.num_preempted = 0

    def wait(self, sample: Sample) -> None:
        """Put a sample in its place among those that wait."""
        bisect.insort(self.waiting, sample, key=lambda other: other.order)

    def admit(self) -> list[Sample]:
        """Give slots to waiting samples, the oldest first, while slots and blocks last."""
        admitted = []
        while self.waiting and self._cache.num_free_slots:
            sample = self.waiting[0]
            if not self._find_blocks(sample):
                break
            self.waiting.pop(0)
            self._enter(sample)
            admitted.append(sample)
        return admitted

    def make_room(self, samples: list[Sample], num_tokens: int) -> list[Sample]:
        """Take the blocks for so many more tokens of each; return those that still have a slot."""
        for sample in samples:
            while sample.slot is not None and not self._extend(sample, num_tokens):
                if not self._prefixes.make_room(also_shared=True):
                    self.preempt(self.running[-1])
        return [sample for sample in samples if sample.slot is not None]

    def leave(self, sample: Sample) -> None:
        """Remove a sample, whether it runs or waits."""
        if sample.slot is not None:
            self.running.remove(sample)
            self._cache.free(sample.slot)
            sample.slot = None
        elif sample in self.waiting:  # others have not read their prompt
            self.waiting.remove(sample)
            self._let_go(sample)

    def preempt(self, sample: Sample) -> None:
        """Take a sample's slot; it waits for another."""
        self.leave(sample)
        self.wait(sample)
        self.num_preempted += 1

    def _extend(self, sample: Sample, num_tokens: int) -> bool:
        assert sample.slot is not None
        length = self._cache.lengths[sample.slot] + num_tokens
        free = self._cache.blocks.num_free
        if free is not None and self._cache.missing_blocks(sample.slot, length) > free:
            return False
        self._cache.extend(sample.slot, length)
        return True

    def _find_blocks(self, sample: Sample) -> bool:
        """Say whether a waiting sample fits, dropping stored prefixes where that helps."""
        blocks = self._cache.blocks
        while blocks.num_free is not None and self._needed(sample) > blocks.num_free:
            # without a running sample nothing would ever make room
            if not self._prefixes.make_room(also_shared=not self.running):
                return False
        return True

    def _needed(self, sample: Sample) -> int:
        """Blocks for what is known of the text and the next token."""
        blocks = self._cache.blocks_of(len(sample.tokens) + 1)
        snapshot = sample.prefix.snapshot if sample.prefix is not None else None
        return blocks - (snapshot.length // self._cache.block_size if snapshot else 0)

    def _enter(self, sample: Sample) -> None:
        prefix = sample.prefix
        if prefix is None or prefix.snapshot is None:
            with_experts = sample.request.experts
            find = self._prefixes.find
            prefix = None if sample.reads_all else find(sample.tokens, with_experts=with_experts)
        sample.slot = self._cache.admit(None if prefix is None else prefix.snapshot)
        self._cache.extend(sample.slot, len(sample.tokens))
        bisect.insort(self.running, sample, key=lambda other: other.order)
        if prefix is not None:
            sample.begin_with(prefix)
        self._let_go(sample)

    def _let_go(self, sample: Sample) -> None:
        if sample.prefix is not None:
            self._prefixes.unshare(sample.prefix)
            sample.prefix = None
