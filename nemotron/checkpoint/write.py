"""Writing a checkpoint aside, committing it in one rename, and keeping the newest few."""

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from nemotron.checkpoint.find import steps
from nemotron.checkpoint.manifest import (
    MODEL,
    STATE,
    DamagedCheckpoint,
    describe_file,
    folder_name,
    verify,
    write_manifest,
)
from nemotron.files import sync_folder, write_json
from nemotron.model.config import ModelConfig
from nemotron.parallel.pieces import Pieces
from nemotron.parallel.runtime import Ranks


class CheckpointNotSaved(Exception):
    """A failed save, in one sentence; earlier checkpoints are untouched."""


def save(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    state: dict[str, Any],  # Any: whatever JSON can hold
    model_config: ModelConfig,
    keep: int,
    ranks: Ranks | None = None,
) -> Path:
    """Write `folder/step-XXXXXXXX` so that it is there completely or not at all.

    `tensors` go through torch's distributed checkpoint, each rank writing what it holds of them;
    `state` and the model's configuration become JSON. Afterwards only the newest `keep` whole
    checkpoints remain.

    Raises:
        CheckpointNotSaved: on every rank, when the file system refuses one of them, with the bytes
            needed and free, or when the step already has a whole checkpoint.
    """
    ranks = ranks or Ranks()
    begin(folder, step, ranks)
    files = write_tensors(folder, step, tensors, ranks)
    return commit(folder, step, files, state, model_config, keep, ranks)


Files = dict[str, dict[str, Any]]  # Any: nested JSON
"""Size and hash of files, by name, as a manifest has them."""


def begin(folder: Path, step: int, ranks: Ranks) -> None:
    """Make room for a checkpoint that is written aside.

    Raises:
        CheckpointNotSaved: when there is none.
    """

    def make() -> None:
        try:
            _set_damaged_aside(folder / folder_name(step))
            _remove_leftovers(folder)
            folder.mkdir(exist_ok=True)
            partial_of(folder, step).mkdir()
        except OSError as error:
            raise _refused(folder, step, error, 0) from error

    ranks.first(make)


def partial_of(folder: Path, step: int) -> Path:
    """Return the folder in which a checkpoint is written aside."""
    return folder / f"{folder_name(step)}.tmp"


def write_tensors(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    ranks: Ranks,
    group: dist.ProcessGroup | None = None,
) -> Files:
    """Write what this rank holds; returns its files. `group` is what the ranks talk through.

    Raises:
        CheckpointNotSaved: on every rank, when the file system refuses one of them.
    """
    partial = partial_of(folder, step)
    try:
        with warnings.catch_warnings():
            # torch reminds of the single process, which is what `no_dist` asks for
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp.save(
                tensors,
                storage_writer=_Writer(str(partial), sync_files=True),
                process_group=group,
                no_dist=not ranks.grouped,
            )
        own = partial.glob(f"__{ranks.rank}_*")
        return {path.name: describe_file(path) for path in own}
    except (CheckpointException, OSError) as error:
        cause: BaseException = error
        if isinstance(error, CheckpointException):
            cause = next(iter(error.failures.values()))[0]
        needed = sum(_num_bytes(tensor) for tensor in tensors.values())
        raise _refused(folder, step, cause, needed) from error


class _Writer(dcp.FileSystemWriter):
    """torch's writer, which says of a refusal what the file system said: others hear that alone."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def commit(
    folder: Path,
    step: int,
    files: Files,
    state: dict[str, Any],
    model_config: ModelConfig,
    keep: int,
    ranks: Ranks,
) -> Path:
    """Make a checkpoint out of what every rank has written; returns its folder.

    Raises:
        CheckpointNotSaved: on every rank, when the file system refuses.
    """
    target, partial = folder / folder_name(step), partial_of(folder, step)
    of_all: Files = {}
    for some in ranks.gather(files):
        of_all |= some

    def publish() -> None:
        try:
            model = dump_model_config(model_config)
            write_json(partial / MODEL, model)
            write_json(partial / STATE, state)
            digest = hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()
            write_manifest(partial, step, digest, of_all)
            sync_folder(partial)
            partial.rename(target)
            sync_folder(folder)
        except OSError as error:
            raise _refused(folder, step, error, 0) from error
        _prune(folder, keep)

    ranks.first(publish)
    return target


def dump_model_config(config: ModelConfig) -> dict[str, Any]:  # Any: pydantic's own result
    """Return the configuration as JSON can hold it: the infinite time-step limit becomes text."""
    low, high = config.time_step_limit
    return config.model_dump(mode="json") | {"time_step_limit": [str(low), str(high)]}


def _refused(folder: Path, step: int, error: BaseException, needed: int) -> CheckpointNotSaved:
    """Clear away what was written, and say why there is no checkpoint.

    Anything but the file system's refusal is raised as it is.
    """
    if not isinstance(error, OSError):
        raise error
    shutil.rmtree(partial_of(folder, step), ignore_errors=True)
    needs = f"it needs {needed:,} bytes, " if needed else ""
    return CheckpointNotSaved(
        f"checkpoint {folder / folder_name(step)} was not saved: {error.strerror or error}; "
        f"{needs}{_free(folder)}"
    )


def _num_bytes(tensor: Tensor) -> int:
    if isinstance(tensor, Pieces):
        return tensor.num_local_bytes
    return tensor.numel() * tensor.element_size()


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
    raise CheckpointNotSaved(f"{target} is a complete checkpoint and is never overwritten")


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed save or a killed removal left behind."""
    for pattern in ("step-*.tmp", "step-*.old"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)


def _prune(folder: Path, keep: int) -> None:
    """Remove complete checkpoints beyond the newest `keep`; damaged ones stay for inspection."""
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
