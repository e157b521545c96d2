"""The weights of a run's checkpoint, read one tensor at a time."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from nemotron.checkpoint.find import Skipped, locate
from nemotron.checkpoint.manifest import CheckpointInfo
from nemotron.checkpoint.read import (
    EMBEDDING,
    MODEL_PREFIX,
    TIED_HEAD,
    SavedTensors,
    read_model_config,
    read_state,
    refusing_adapters,
)
from nemotron.errors import UserError
from nemotron.hf.formats import Formats, imported_formats
from nemotron.hf.names import DiskParameter
from nemotron.model.adapter import adapters_of, merged
from nemotron.model.build import shapes
from nemotron.model.config import ModelConfig
from nemotron.run.files import RunFiles

CANDIDATES = "candidates.weight"
"""What joins the embeddings of several candidates."""


@dataclass(frozen=True)
class CheckpointSource:
    """A verified checkpoint; `skipped` are newer ones that cannot be used."""

    info: CheckpointInfo
    config: ModelConfig
    skipped: tuple[Skipped, ...] = ()

    @property
    def run(self) -> RunFiles | None:
        """The run's files, when the checkpoint lies among them."""
        return RunFiles.around(self.info.folder)

    @property
    def is_trained(self) -> bool:
        """Whether runs of ours trained the model; else it was only imported."""
        state = read_state(self.info)
        return state.trainer is not None or state.merged is not None

    @property
    def trunk(self) -> "CheckpointSource":
        """The model without what text correction adds: it reads candidates that are all alike.

        Raises:
            UserError: when nothing was added, or the embedding cannot take up what joins
                candidates.
        """
        if self.config.num_candidates == 1 and not self.config.edit_heads:
            rule = "leaves out nothing: the model is plain; export it whole."
            raise UserError(rule, key="--trunk-only")
        if self.config.num_candidates > 1 and self.config.tie_word_embeddings:
            raise UserError(
                "shares a matrix between head and embedding, which cannot take up what joins "
                "several candidates; such a trunk cannot be exported.",
                key="model.tie_word_embeddings",
                value="true",
            )
        return replace(self, config=self.config.model_copy(update={"correction": None}))

    def formats(self, choice: Formats) -> Formats:
        """Return the formats of an export: the choice, but an imported model keeps its own."""
        imported = read_state(self.info).imported
        stored = imported.get("formats") if imported is not None else None
        return imported_formats(stored, choice) if isinstance(stored, dict) else choice

    def reader(self) -> "TensorReader":
        """Return what reads its parameters as they belong on disk."""
        return TensorReader(self)


class TensorReader:
    """Gives parameters as they belong on disk; keeps the last tensor read: experts share theirs.

    Raises:
        UserError: when the checkpoint's tensors are not those of its configuration.
    """

    def __init__(self, source: CheckpointSource) -> None:
        self._info = source.info
        self._saved = SavedTensors(source.info)
        self._shapes = shapes(source.config)
        self._is_tied = source.config.tie_word_embeddings
        self._joined = (
            1 if source.config.correction else read_model_config(source.info).num_candidates
        )
        self._last: tuple[str, Tensor] | None = None
        wanted = {self._saved_name(name): shape for name, shape in self._shapes.items()}
        self._saved.check({n: torch.empty(shape, device="meta") for n, shape in wanted.items()})

    def __call__(self, parameter: DiskParameter) -> dict[str, Tensor]:
        """Return the tensors of a parameter by their names on disk."""
        return parameter.encode(self._master(parameter))

    def num_rounded(self, parameter: DiskParameter) -> int:
        """Return how many values of a parameter its format on disk changes."""
        master = self._master(parameter)
        decoded = parameter.decode(parameter.encode(master))
        return int((decoded != parameter.part_of(master)).sum())

    def read(self, source: str) -> Tensor:
        """Return a parameter or buffer of the model in float32, with its adapter in it."""
        master = torch.empty(self._shapes[source])
        self._saved.load({self._saved_name(source): master})
        master = self._with_adapter(source, master)
        return self._with_candidates(master) if source == EMBEDDING else master

    def _with_candidates(self, embedding: Tensor) -> Tensor:
        """Return the embedding of a trunk: of candidates that are alike, joined."""
        size, count = embedding.shape[1], self._joined
        if count == 1:
            return embedding
        weight = torch.empty(size, count * size)
        self._saved.load({MODEL_PREFIX + CANDIDATES: weight})
        return embedding @ weight.view(size, count, size).sum(1).T

    def _saved_name(self, source: str) -> str:
        is_embedding = self._is_tied and source == TIED_HEAD
        return MODEL_PREFIX + (EMBEDDING if is_embedding else source)

    def _master(self, parameter: DiskParameter) -> Tensor:
        """Return the model's float32 tensor that the parameter is a part of."""
        if self._last is None or self._last[0] != parameter.source:
            # the old one is let go before memory for the next is taken
            self._last = None
            self._last = (parameter.source, self.read(parameter.source))
        return self._last[1]

    def _with_adapter(self, source: str, master: Tensor) -> Tensor:
        """Return a tensor with its adapter in it, if it has one."""
        start = MODEL_PREFIX + adapters_of(source)
        found = self._saved.empty(start)
        if not found:
            return master
        self._saved.load(found)
        with refusing_adapters(self._info):
            return merged(master, {name.removeprefix(start): t for name, t in found.items()})


def open_checkpoint(path: Path) -> CheckpointSource:
    """Open the newest complete checkpoint of a run's folder, or the checkpoint at `path`.

    Raises:
        UserError: when there is none.
    """
    found = locate(path)
    assert found.info is not None
    return CheckpointSource(found.info, read_model_config(found.info), found.skipped)
