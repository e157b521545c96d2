"""Writing a checkpoint beside training: the step waits for a copy of the tensors, no longer."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from nemotron.checkpoint.write import Files, begin, commit, write_tensors
from nemotron.model.config import ModelConfig
from nemotron.parallel.pieces import Pieces
from nemotron.parallel.runtime import Ranks


class BackgroundSaver:
    """At most one checkpoint on its way, which becomes one when every rank has written its part.

    All methods are called by every rank at the same place.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._threads = ThreadPoolExecutor(1, "checkpoint")
        # the thread's own way to the other ranks: a group must not be used by two threads at once
        self._group = dist.new_group(backend="gloo") if ranks.grouped else None
        self._written: Future[Files] | None = None
        self._commit_with: tuple[Any, ...] = ()

    @property
    def step(self) -> int | None:
        """Step of the checkpoint that is on its way."""
        return None if self._written is None else self._commit_with[1]

    def start(
        self,
        folder: Path,
        step: int,
        tensors: dict[str, Tensor],
        state: dict[str, Any],  # Any: whatever JSON can hold
        model_config: ModelConfig,
        keep: int,
    ) -> None:
        """Copy the tensors and begin to write them; none other may be on its way.

        Raises:
            CheckpointNotSaved: when there is no room for it.
        """
        assert self._written is None, f"step {self.step} is still on its way"
        begin(folder, step, self._ranks)
        copies = {name: _copy(tensor) for name, tensor in tensors.items()}
        self._commit_with = folder, step, state, model_config, keep
        self._written = self._threads.submit(
            write_tensors, folder, step, copies, self._ranks, self._group
        )

    def finish(self, *, wait: bool) -> Path | None:
        """Make it a checkpoint if every rank has written its part; `wait` until then.

        Returns its folder, or None when there is none yet.

        Raises:
            CheckpointNotSaved: on every rank, when the file system refused one of them.
        """
        written = self._written
        if written is None or not (wait or all(self._ranks.gather(written.done()))):
            return None
        self._written = None
        self._ranks.all(written.result)
        folder, step, state, model_config, keep = self._commit_with
        return commit(folder, step, written.result(), state, model_config, keep, self._ranks)


def _copy(tensor: Tensor) -> Tensor:
    if isinstance(tensor, Pieces):
        return tensor.replaced({at: _copy(piece) for at, piece in tensor.pieces.items()})
    return tensor.detach().to("cpu", copy=True)
