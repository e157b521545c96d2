"""Reading a verified checkpoint: tensors into place, or the weights of its model."""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemotron.checkpoint.find import locate
from nemotron.checkpoint.manifest import MODEL, STATE, CheckpointInfo, DamagedCheckpoint
from nemotron.checkpoint.metadata import SafeReader
from nemotron.errors import UserError
from nemotron.model.config import ModelConfig

MODEL_PREFIX = "model."
"""Names of the model's parameters and buffers in a checkpoint begin with this."""

log = logging.getLogger(__name__)


def read_state(info: CheckpointInfo) -> dict[str, Any]:  # Any: whatever JSON can hold
    """Return what was saved beside the tensors."""
    return json.loads((info.folder / STATE).read_text())


def read_model_config(info: CheckpointInfo) -> ModelConfig:
    """Return the configuration of the checkpoint's model."""
    values = json.loads((info.folder / MODEL).read_text())
    values["time_step_limit"] = [float(limit) for limit in values["time_step_limit"]]
    return ModelConfig.model_validate(values)


def load_tensors(info: CheckpointInfo, into: dict[str, Tensor]) -> None:
    """Copy tensors of the checkpoint into the given ones, which stay where they are.

    Every rank reads what it holds, and does not wait for others.

    Raises:
        UserError: when a name is absent or a shape or dtype differs (the first ten are named),
            or when the index holds what no checkpoint needs.
    """
    saved = _saved_tensors(info)
    problems = [_difference(name, tensor, saved.get(name)) for name, tensor in into.items()]
    if found := [problem for problem in problems if problem]:
        more = f"; and {len(found) - 10} more" if len(found) > 10 else ""
        raise UserError(
            f"{info.folder} does not fit the model: {'; '.join(found[:10])}{more}; "
            f"compare the recipe's model section with {MODEL} in that folder."
        )
    try:
        with warnings.catch_warnings():
            # torch reminds of the single process, which is what `no_dist` asks for
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp.load(into, storage_reader=SafeReader(info), no_dist=True)
    except CheckpointException as exception:
        cause = next(iter(exception.failures.values()))[0]
        if not isinstance(cause, Exception):
            raise cause from exception  # Ctrl-C
        # names, shapes and hashes were right, so the file is not what a save writes
        reason = str(cause).splitlines()[0]
        raise UserError(f"{info.folder} is damaged: {reason}; use another one.") from exception


def lacking(info: CheckpointInfo, tensors: dict[str, Tensor]) -> list[str]:
    """Return the names of which the checkpoint has no tensor of this shape and dtype."""
    saved = _saved_tensors(info)
    return [name for name, tensor in tensors.items() if _difference(name, tensor, saved.get(name))]


def read_model(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return configuration and weights of the newest whole checkpoint at `path`, on the CPU.

    `path` is the folder of a run, its `checkpoints` folder, or one checkpoint. Names are those of
    `HybridLM.state_dict()`. Damaged newer checkpoints are named in the log.

    Raises:
        UserError: when there is no whole checkpoint.
    """
    found = locate(path)
    for line in found.skipped:
        log.warning("%s", line)
    info = found.info
    assert info is not None
    weights = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in _saved_tensors(info).items()
        if name.startswith(MODEL_PREFIX)
    }
    load_tensors(info, weights)
    named = {name.removeprefix(MODEL_PREFIX): tensor for name, tensor in weights.items()}
    return read_model_config(info), named


def _saved_tensors(info: CheckpointInfo) -> dict[str, TensorStorageMetadata]:
    try:
        index = SafeReader(info).read_metadata()
    except DamagedCheckpoint as damage:
        raise UserError(f"{info.folder} is damaged: {damage}; use another one.") from None
    return {
        name: entry
        for name, entry in index.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def _difference(name: str, tensor: Tensor, saved: TensorStorageMetadata | None) -> str | None:
    if saved is None:
        return f"{name} is absent"
    if saved.size != tensor.shape:
        return f"{name} has shape {list(saved.size)} instead of {list(tensor.shape)}"
    if saved.properties.dtype != tensor.dtype:
        return f"{name} is {saved.properties.dtype} instead of {tensor.dtype}"
    return None
