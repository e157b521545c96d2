"""Writing a checkpoint aside, committing it in one rename, and keeping the newest few."""

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from nemotron.checkpoint.find import steps
from nemotron.checkpoint.manifest import (
    MODEL,
    STATE,
    DamagedCheckpoint,
    folder_name,
    verify,
    write_manifest,
)
from nemotron.files import sync_folder, write_json
from nemotron.model.config import ModelConfig


class CheckpointNotSaved(Exception):
    """A save that was refused, in one sentence; what was there before is untouched."""


def save(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    state: dict[str, Any],  # Any: whatever JSON can hold
    model_config: ModelConfig,
    keep: int,
) -> Path:
    """Write `folder/step-XXXXXXXX` so that it is there completely or not at all.

    `tensors` go through torch's distributed checkpoint, `state` and the model's configuration
    become JSON. Afterwards only the newest `keep` whole checkpoints remain.

    Raises:
        CheckpointNotSaved: when the file system refuses, with the bytes needed and free, or when
            the step already has a whole checkpoint.
    """
    target = folder / folder_name(step)
    partial = folder / f"{target.name}.tmp"
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    try:
        _set_damaged_aside(target)
        _remove_leftovers(folder)
        folder.mkdir(exist_ok=True)
        partial.mkdir()
        _write(partial, step, tensors, state, model_config)
        partial.rename(target)
        sync_folder(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointNotSaved(
            f"checkpoint {target} was not saved: {error.strerror or error}; "
            f"it needs {needed:,} bytes, {_free(folder)}"
        ) from error
    _prune(folder, keep)
    return target


def dump_model_config(config: ModelConfig) -> dict[str, Any]:  # Any: pydantic's own result
    """Return the configuration as JSON can hold it: the infinite time-step limit becomes text."""
    low, high = config.time_step_limit
    return config.model_dump(mode="json") | {"time_step_limit": [str(low), str(high)]}


def _write(
    partial: Path,
    step: int,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    model_config: ModelConfig,
) -> None:
    writer = dcp.FileSystemWriter(str(partial), sync_files=True)
    try:
        with warnings.catch_warnings():
            # torch reminds of the single process, which is what `no_dist` asks for
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp.save(tensors, storage_writer=writer, no_dist=True)
    except CheckpointException as exception:
        cause = next(iter(exception.failures.values()))[0]
        if isinstance(cause, RuntimeError) and isinstance(cause.__context__, OSError):
            cause = cause.__context__  # torch's writer wraps what the file system said
        raise cause from exception
    model = dump_model_config(model_config)
    write_json(partial / MODEL, model)
    write_json(partial / STATE, state)
    digest = hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()
    write_manifest(partial, step, digest)
    sync_folder(partial)


def _set_damaged_aside(target: Path) -> None:
    if not target.exists():
        return
    try:
        verify(target)
    except DamagedCheckpoint:
        aside = target.with_name(f"{target.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
        return
    raise CheckpointNotSaved(f"{target} is a whole checkpoint; it is never overwritten")


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed save or a killed removal left behind."""
    for pattern in ("step-*.tmp", "step-*.old"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)


def _prune(folder: Path, keep: int) -> None:
    """Remove whole checkpoints beyond the newest `keep`; damaged ones are left for inspection."""
    kept = 0
    for step in steps(folder):
        path = folder / folder_name(step)
        try:
            verify(path, content=False)
        except DamagedCheckpoint:
            continue
        kept += 1
        if kept > keep:
            # renamed first: a half-removed folder must not look like a damaged checkpoint
            old = path.with_name(f"{path.name}.old")
            path.rename(old)
            shutil.rmtree(old)


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free:,} are free"
    except OSError:
        return f"and {folder} is gone"
