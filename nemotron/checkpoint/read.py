"""Reading a verified checkpoint: tensors into place, or the weights of its model."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import JsonValue, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemotron.checkpoint.find import locate
from nemotron.checkpoint.index import (
    DTYPES,
    NAMES,
    Index,
    SavedPiece,
    SavedTensor,
    key_of,
    read_index,
)
from nemotron.checkpoint.manifest import MODEL, STATE, CheckpointInfo
from nemotron.checkpoint.records import DamagedCheckpoint, explain, read_record
from nemotron.checkpoint.state import SavedState
from nemotron.errors import UserError
from nemotron.model.adapter import WrongAdapter, merge_all
from nemotron.model.build import shapes
from nemotron.model.config import ModelConfig
from nemotron.parallel.shards import local_shards

MODEL_PREFIX = "model."
"""Names of the model's parameters and buffers in a checkpoint begin with this."""

log = logging.getLogger(__name__)


def read_state(info: CheckpointInfo) -> SavedState:
    """Return what was saved beside the tensors.

    Raises:
        UserError: when a key is unknown, absent or of another type.
    """
    with _refusing_damage(info):
        state = read_record(info.folder / STATE, SavedState)
        if state.trainer is not None and state.trainer.step != info.step:
            raise DamagedCheckpoint(
                f"{STATE}: trainer.step = {state.trainer.step} is not the step {info.step} of "
                f"the manifest"
            )
        return state


EMBEDDING, TIED_HEAD = "backbone.embeddings.weight", "lm_head.weight"
"""One parameter where embeddings are tied, which a trained run saves under the first name."""


def read_model_config(info: CheckpointInfo) -> ModelConfig:
    """Return the configuration of the checkpoint's model.

    Raises:
        UserError: when a key is unknown, absent or of another type.
    """
    with _refusing_damage(info):
        return parse_model_config(info.folder / MODEL)


def parse_model_config(path: Path) -> ModelConfig:
    """Return the configuration in a checkpoint's `model.json`.

    Raises:
        DamagedCheckpoint: when it is none.
    """
    values = read_record(path, dict[str, JsonValue])
    limit = values.get("time_step_limit")
    try:
        if isinstance(limit, list):  # infinity is text, which JSON has no number for
            numbers: list[JsonValue] = [float(str(bound)) for bound in limit]
            values["time_step_limit"] = numbers
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        raise DamagedCheckpoint(f"{path.name}: {explain(error)}") from None
    except ValueError:
        raise DamagedCheckpoint(f"{path.name}: time_step_limit must be two numbers") from None


class SavedTensors:
    """The tensors of a verified checkpoint; its files stay mapped into memory.

    Raises:
        UserError: when the index does not fit the files.
    """

    def __init__(self, info: CheckpointInfo) -> None:
        self._info = info
        with _refusing_damage(info):
            self.index: Index = read_index(info)
        self._files: dict[str, safe_open] = {}

    @torch.no_grad()
    def load(self, into: dict[str, Tensor]) -> None:
        """Copy tensors of the checkpoint into the given ones, which stay where they are.

        Every rank reads what it holds, and does not wait for others.

        Raises:
            UserError: when they do not fit (see `check`), or a file is not what the index says.
        """
        self.check(into)
        with _refusing_damage(self._info):
            for name, tensor in into.items():
                saved = self.index.tensors[name]
                for offsets, shard in local_shards(tensor).items():
                    self._fill(name, saved, offsets, shard)

    def check(self, tensors: dict[str, Tensor]) -> None:
        """Check that the checkpoint has tensors like these, which need no memory behind them.

        Raises:
            UserError: when a name is absent or a shape or dtype differs; the first ten are named.
        """
        problems = [self._difference(name, tensor) for name, tensor in tensors.items()]
        if found := [problem for problem in problems if problem]:
            more = f"; and {len(found) - 10} more" if len(found) > 10 else ""
            raise UserError(
                f"does not fit the model: {'; '.join(found[:10])}{more}; "
                f"compare the recipe's model section with {MODEL} in that folder.",
                where=str(self._info.folder),
            )

    def lacking(self, tensors: dict[str, Tensor]) -> list[str]:
        """Return the names of which the checkpoint has no tensor of this shape and dtype."""
        return [name for name, tensor in tensors.items() if self._difference(name, tensor)]

    def empty(self, prefix: str = "") -> dict[str, Tensor]:
        """Return tensors to load into, of all whose names begin so."""
        return {
            name: torch.empty(saved.shape, dtype=DTYPES[saved.dtype])
            for name, saved in self.index.tensors.items()
            if name.startswith(prefix)
        }

    def _fill(self, name: str, saved: SavedTensor, at: tuple[int, ...], piece: Tensor) -> None:
        for source in saved.pieces:
            box = [
                (max(a, b), min(a + n, b + m))
                for a, n, b, m in zip(at, piece.shape, source.offsets, source.shape, strict=True)
            ]
            if all(low < high for low, high in box):
                there = self._read(name, source, saved.dtype)
                piece[_seen_from(at, box)].copy_(there[_seen_from(source.offsets, box)])

    def _read(self, name: str, piece: SavedPiece, dtype: str) -> Tensor:
        """Return a piece, of which no more is read from the disk than is used."""
        key = key_of(name, piece.offsets)
        try:
            if piece.file not in self._files:
                path = self._info.folder / piece.file
                self._files[piece.file] = safe_open(path, framework="pt")
            found = self._files[piece.file].get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise DamagedCheckpoint(f"{piece.file}: {str(error).splitlines()[0]}") from None
        if (tuple(found.shape), found.dtype) != (piece.shape, DTYPES[dtype]):
            raise DamagedCheckpoint(f"{piece.file}: {key} has not the index's shape and dtype")
        return found

    def _difference(self, name: str, tensor: Tensor) -> str | None:
        saved = self.index.tensors.get(name)
        if saved is None:
            return f"{name} is absent"
        if saved.shape != tuple(tensor.shape):
            return f"{name} has shape {list(saved.shape)} instead of {list(tensor.shape)}"
        if saved.dtype != NAMES.get(tensor.dtype):
            return f"{name} is {DTYPES[saved.dtype]} instead of {tensor.dtype}"
        return None


def read_model(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return configuration and weights of the newest whole checkpoint at `path`, on the CPU.

    `path` is the folder of a run, its `checkpoints` folder, or one checkpoint. Names are those of
    `HybridLM.state_dict()`, and adapters are merged. Damaged newer checkpoints
    are named in the log.

    Raises:
        UserError: when there is no whole checkpoint.
    """
    found = locate(path)
    for skipped in found.skipped:
        log.warning("%s", skipped)
    info = found.info
    assert info is not None
    saved = SavedTensors(info)
    config = read_model_config(info)
    weights = saved.empty(MODEL_PREFIX)
    saved.load(weights)
    own = {n.removeprefix(MODEL_PREFIX): tensor for n, tensor in weights.items()}
    with refusing_adapters(info):
        named = merge_all(own)
    if config.tie_word_embeddings and EMBEDDING in named:
        named[TIED_HEAD] = named[EMBEDDING]
    with _refusing_damage(info):
        _check_shapes(config, named)
    return config, named


def _check_shapes(config: ModelConfig, weights: dict[str, Tensor]) -> None:
    own = shapes(config)
    for name in own | weights:
        wanted = list(own[name]) if name in own else "absent"
        found = list(weights[name].shape) if name in weights else "absent"
        if wanted != found:
            raise DamagedCheckpoint(f"{name} is {found}, but {MODEL} wants {wanted}")


def _seen_from(start: tuple[int, ...], box: list[tuple[int, int]]) -> tuple[slice, ...]:
    return tuple(slice(low - s, high - s) for s, (low, high) in zip(start, box, strict=True))


@contextmanager
def refusing_adapters(info: CheckpointInfo) -> Iterator[None]:
    """Turn what is wrong with adapters into the sentence about a damaged checkpoint.

    Raises:
        UserError: in place of `WrongAdapter`.
    """
    try:
        yield
    except WrongAdapter as damage:
        raise UserError(f"is damaged: {damage}; use another one.", where=str(info.folder)) from None


@contextmanager
def _refusing_damage(info: CheckpointInfo) -> Iterator[None]:
    try:
        yield
    except DamagedCheckpoint as damage:
        raise UserError(f"is damaged: {damage}; use another one.", where=str(info.folder)) from None
