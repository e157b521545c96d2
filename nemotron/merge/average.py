"""The weighted average of checkpoints, one tensor at a time."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from nemotron.checkpoint.draft import tensor_file
from nemotron.checkpoint.manifest import Files, verify
from nemotron.checkpoint.read import MODEL_PREFIX, TIED_HEAD
from nemotron.checkpoint.state import SavedState
from nemotron.checkpoint.tensor_file import write_tensor_file
from nemotron.checkpoint.write import begin, commit
from nemotron.errors import UserError
from nemotron.merge.window import Window
from nemotron.model.build import build_on_meta
from nemotron.parallel.runtime import Ranks


class Average:
    """A model that is the weighted sum of checkpoints; nothing is read before it is asked for."""

    def __init__(self, window: Window, coefficients: Sequence[float]) -> None:
        self.window = window
        self.coefficients = tuple(coefficients)
        self._readers = [one.reader for one in window]

    def names(self) -> dict[str, Tensor]:
        """Return parameters and buffers of the model, without memory behind them."""
        config = self.window[-1].source.config
        named = build_on_meta(config).state_dict()
        if config.tie_word_embeddings:
            del named[TIED_HEAD]
        return named

    def tensor(self, name: str) -> Tensor:
        """Return the average of a parameter or buffer, in float32.

        The router's bias is averaged as weights are.

        Raises:
            UserError: when it is not finite.
        """
        total: Tensor | None = None
        for reader, coefficient in zip(self._readers, self.coefficients, strict=True):
            values = reader.read(name)
            if total is None:
                total = values.mul_(coefficient)
            else:
                total.add_(values, alpha=coefficient)
        assert total is not None
        if not total.isfinite().all():
            steps = ", ".join(str(one.step) for one in self.window)
            raise UserError(
                f"is not finite in one of the checkpoints {steps}; leave it out.", key=name
            )
        return total

    def write(self, folder: Path, state: SavedState) -> None:
        """Write the average as a checkpoint, with the newest one's step, and verify it.

        Raises:
            CheckpointNotSaved: when the file system refuses.
            DamagedCheckpoint: when what was written reads otherwise.
        """
        newest, ranks = self.window[-1], Ranks()
        tensors = {f"{MODEL_PREFIX}{name}": tensor for name, tensor in self.names().items()}
        draft = begin(folder, newest.step, tensors, ranks)
        read = lambda key: self.tensor(key.removeprefix(MODEL_PREFIX))  # noqa: E731

        def write() -> Files:
            name = tensor_file(0)
            return {name: write_tensor_file(draft.partial / name, tensors, read)}

        saved = commit(draft, write, state, newest.source.config, 1, ranks)
        verify(saved.folder)

    @torch.no_grad()
    def load(self, model: torch.nn.Module) -> None:
        """Copy the average into a model that is built, tensor by tensor."""
        into = model.state_dict()
        for name in self.names():
            into[name].copy_(self.tensor(name))
