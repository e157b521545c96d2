"""Writing a checkpoint while training continues: a step waits only for a copy of the tensors."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nemotron.checkpoint.draft import Draft
from nemotron.checkpoint.manifest import Files
from nemotron.checkpoint.state import SavedState
from nemotron.checkpoint.write import Content, Saved, begin, commit, write_tensors
from nemotron.model.config import ModelConfig
from nemotron.parallel.runtime import Ranks
from nemotron.parallel.shards import ShardedTensor


@dataclass(frozen=True)
class _Underway:
    """A checkpoint on its way, and what will be committed with it."""

    draft: Draft
    written: Future[Files]
    state: SavedState
    model_config: ModelConfig
    keep: int


class BackgroundSaver:
    """At most one checkpoint on its way, which becomes one when every rank has written its part.

    All methods are called by every rank at the same place.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._threads = ThreadPoolExecutor(1, "checkpoint")
        self._memory = HostMemory()
        self._underway: _Underway | None = None

    @property
    def step(self) -> int | None:
        """Step of the checkpoint that is on its way."""
        return None if self._underway is None else self._underway.draft.step

    def start(self, folder: Path, content: Content, keep: int) -> None:
        """Copy the tensors and begin to write them; none other may be on its way.

        Raises:
            CheckpointNotSaved: when there is no room for it.
        """
        assert self._underway is None, f"step {self.step} is still being written"
        draft = begin(folder, content.step, content.tensors, self._ranks)
        copies = self._memory.copy(content.tensors)
        written = self._threads.submit(write_tensors, draft, copies, self._ranks.rank)
        self._underway = _Underway(draft, written, content.state, content.model_config, keep)

    def finish(self, *, wait: bool) -> Saved | None:
        """Make it a checkpoint if every rank has written its part; `wait` until then.

        Returns None when it is not one yet.

        Raises:
            CheckpointNotSaved: on every rank, when the file system refused one of them.
        """
        now = self._underway
        if now is None or not (wait or all(self._ranks.gather(now.written.done()))):
            return None
        self._underway = None
        write = now.written.result
        return commit(now.draft, write, now.state, now.model_config, now.keep, self._ranks)


class HostMemory:
    """Copies of tensors on the host; those from a GPU reuse the same memory each time.

    A GPU copies several times faster into pinned memory, which is slow to allocate.
    """

    def __init__(self) -> None:
        self._pinned: dict[tuple[object, ...], Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies; those of the call before are overwritten if they came from a GPU."""
        copies = {name: self._copy((name,), tensor) for name, tensor in tensors.items()}
        if self._pinned:
            torch.cuda.current_stream().synchronize()
        return copies

    def _copy(self, key: tuple[object, ...], tensor: Tensor) -> Tensor:
        if isinstance(tensor, ShardedTensor):
            shards = tensor.shards.items()
            return tensor.replaced({at: self._copy((*key, at), shard) for at, shard in shards})
        tensor = tensor.detach()
        if tensor.device.type != "cuda":
            return tensor.to("cpu", copy=True)
        kept = self._pinned.get(key)
        if kept is None or (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
            kept = self._pinned[key] = _pinned(tensor)
        return kept.copy_(tensor, non_blocking=True)


def _pinned(tensor: Tensor) -> Tensor:
    """Return pinned memory for a tensor, of just its size: torch's rounds up to a power of 2."""
    memory = torch.empty(tensor.shape, dtype=tensor.dtype)
    if memory.nbytes:
        runtime = torch.cuda.cudart()
        torch.cuda.check_error(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    return memory
