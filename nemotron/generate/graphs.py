"""Steps of one token at fixed sizes, which a GPU runs as CUDA graphs: one launch for the model.

A step of a hybrid model starts hundreds of small kernels, and the host takes longer to start them
than the GPU to run them. A graph is captured for each size: a number of rows and of key-value
blocks for each, both rounded up. What changes from step to step lies in one tensor.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.generate.routing import recorded
from nemotron.model.cache import Cache
from nemotron.model.cached_rows import CachedRows
from nemotron.model.hybrid import HybridLM
from nemotron.model.state import AttentionState, MambaState, Places

log = logging.getLogger(__name__)

FEW_ROWS = 8
"""Up to so many rows, and from there in multiples of it, numbers of rows are rounded up."""


@dataclass(frozen=True)
class Size:
    """Rows of a step, and the key-value blocks that each of them can read."""

    rows: int
    blocks: int
    in_order: bool
    """Whether the rows are the slots after the spare one, whose states need no copies."""


@dataclass(frozen=True)
class Appended:
    """What a step of one token found."""

    logits: Float[Tensor, "B V"]
    """Of the next token of each text."""
    experts: Int[Tensor, "B 1 layers K"] | None
    """Where they are recorded: those of the token, int16 on the host."""


class FixedRows(CachedRows):
    """Rows of a cache whose slots, blocks and lengths are read from a tensor in each call.

    A call reads and changes nothing of the cache but its tensors, since a graph repeats only what
    happens on the device.
    """

    def __init__(self, cache: Cache, size: Size) -> None:
        self.cache, self.size = cache, size
        shape = (size.rows, 4 + size.blocks)
        self.numbers = torch.zeros(shape, dtype=torch.int64, device=cache.device)
        """For each row: token, slot, place of the token, length with it, then its blocks."""
        self.chosen = slice(1, 1 + size.rows) if size.in_order else self.numbers[:, 1]
        self.layers = cache.states_of(self.chosen)

    @property
    def tokens(self) -> Int[Tensor, "B 1"]:
        """The newest token of each row."""
        return self.numbers[:, :1]

    def begin(self, num_tokens: int) -> None:
        """Read the rows' states, and set where keys and values are stored."""
        assert num_tokens == 1, num_tokens
        longest = self.size.blocks * self.cache.block_size
        read = self.numbers[:, 4:].flatten()
        places = Places(self.numbers[:, 2], read, longest, self.numbers[:, 3])
        for layer in self.layers:
            if isinstance(layer, MambaState):
                layer.load()
            elif isinstance(layer, AttentionState):
                layer.places = places

    def end(self, num_tokens: int) -> None:
        """Count nothing: the caller that repeats the graph does."""


class Steps:
    """Appends one token to each of several texts of a cache, at a few fixed sizes.

    Takes a slot and a block of the cache for rows that only fill a step up.
    """

    def __init__(self, cache: Cache) -> None:
        assert cache.num_free_slots == len(cache.lengths), "the cache is in use"
        self._cache, self._spare = cache, cache.admit()
        cache.extend(self._spare, 1)
        self._steps: dict[tuple[Size, bool], _Step] = {}
        self._made_for: tuple[HybridLM, int] | None = None

    @torch.inference_mode()
    def append(
        self,
        model: HybridLM,
        slots: Sequence[int],
        tokens: Sequence[int],
        *,
        has_experts: bool = False,
    ) -> Appended:
        """Append a token to the text of each slot; `has_experts` records where routers sent it.

        Raises:
            OutOfBlocks: when there is no block for a token; no text has changed then.
        """
        for slot in slots:
            self._cache.extend(slot, self._cache.lengths[slot] + 1)
        size = self._size(slots)
        if self._made_for != (made_for := (model, self._cache.blocks.count)):
            # keys and values have moved, or the weights are others
            self._steps, self._made_for = {}, made_for
        numbers = torch.tensor(self._numbers(size, slots, tokens))
        step = self._steps.get((size, has_experts))
        if step is None:
            step = _Step(model, FixedRows(self._cache, size), numbers, has_experts=has_experts)
            self._steps[size, has_experts] = step
        step.rows.numbers.copy_(numbers)
        found, count = step.run(), len(slots)
        self._cache.count(slots, 1)
        experts = found.experts
        return Appended(
            found.logits[:count].clone(), None if experts is None else experts[:count].cpu()
        )

    def _size(self, slots: Sequence[int]) -> Size:
        count, cache = len(slots), self._cache
        rows = _power_of_2(count) if count <= FEW_ROWS else -(-count // FEW_ROWS) * FEW_ROWS
        blocks = max(cache.blocks_of(cache.lengths[slot] + 1) for slot in slots)
        return Size(rows, _power_of_2(blocks), list(slots) == list(range(1, 1 + rows)))

    def _numbers(self, size: Size, slots: Sequence[int], tokens: Sequence[int]) -> list[list[int]]:
        cache, rows = self._cache, []
        for slot, token in zip(slots, tokens, strict=True):
            place, table = cache.lengths[slot], cache.tables[slot]
            written = table[place // cache.block_size] * cache.block_size
            written += place % cache.block_size
            # the last blocks may be any; nobody reads them
            blocks = (table + [0] * size.blocks)[: size.blocks]
            rows.append([token, slot, written, place + 1, *blocks])
        block = cache.tables[self._spare][0]
        filling = [0, self._spare, block * cache.block_size, 1, *[block] * size.blocks]
        return rows + [filling] * (size.rows - len(rows))


class _Step:
    """One call of a model at one size; on a GPU it is captured, if nothing in it needs the host."""

    def __init__(
        self, model: HybridLM, rows: FixedRows, numbers: Int[Tensor, "B N"], *, has_experts: bool
    ) -> None:
        self._model, self.rows, self._has_experts = model, rows, has_experts
        self._graph: torch.cuda.CUDAGraph | None = None
        self._found = Appended(torch.empty(0), None)
        if rows.numbers.device.type == "cuda":
            rows.numbers.copy_(numbers)
            self._capture()

    def run(self) -> Appended:
        """Do the step for the numbers in `rows`; the next call overwrites the result."""
        if self._graph is None:
            return self._call()
        self._graph.replay()
        return self._found

    def _call(self) -> Appended:
        model = self._model
        with recorded(model, on=self._has_experts) as record:
            hidden = model(self.rows.tokens, cache=self.rows)
        experts = record.experts(self.rows.size.rows) if record.layers else None
        return Appended(model.logits(hidden[:, -1]), experts)

    def _capture(self) -> None:
        kept = self.rows.cache.copies(self.rows.chosen)
        try:
            # kernels are compiled and workspaces made in a first call
            self._call()
            with _without_waits():
                self._call()
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            reason = str(error).splitlines()[0]
            log.warning("steps run without CUDA graphs, which cannot wait: %s", reason)
        else:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._found = self._call()
            self._graph = graph
        finally:
            self.rows.cache.restore(self.rows.chosen, kept)


@contextmanager
def _without_waits() -> Iterator[None]:
    """Raise an error where the host waits for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
