"""Writing a checkpoint aside, and committing it in one rename."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nemotron.checkpoint.draft import Draft, plan_index, tensor_file
from nemotron.checkpoint.housekeeping import new_partial, prune, remove_leftovers, set_aside
from nemotron.checkpoint.index import key_of
from nemotron.checkpoint.manifest import (
    INDEX,
    MODEL,
    STATE,
    Files,
    folder_name,
    verify,
    write_manifest,
)
from nemotron.checkpoint.records import DamagedCheckpoint
from nemotron.checkpoint.state import SavedState
from nemotron.checkpoint.tensor_file import write_tensor_file
from nemotron.files import sync_folder, write_json, write_text
from nemotron.model.config import ModelConfig
from nemotron.parallel.runtime import Ranks
from nemotron.parallel.shards import local_shards


class CheckpointNotSaved(Exception):
    """A failed save, in one sentence; earlier checkpoints are untouched."""


@dataclass(frozen=True)
class Content:
    """What a checkpoint of a step contains."""

    step: int
    tensors: dict[str, Tensor]
    state: SavedState
    model_config: ModelConfig


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was committed; `notes` say which older folders could not be removed."""

    folder: Path
    notes: tuple[str, ...]


def save(folder: Path, content: Content, keep: int, ranks: Ranks | None = None) -> Saved:
    """Write `folder/step-XXXXXXXX` so that it exists completely or not at all.

    Each rank writes a safetensors file with what it holds of the tensors; state and the model's
    configuration become JSON. Afterwards only the newest `keep` whole checkpoints remain.

    Raises:
        CheckpointNotSaved: on every rank, when the file system refuses one of them, with the bytes
            needed and free, or when the step already has a whole checkpoint.
    """
    ranks = ranks or Ranks()
    draft = begin(folder, content.step, content.tensors, ranks)
    write = lambda: write_tensors(draft, content.tensors, ranks.rank)  # noqa: E731
    return commit(draft, write, content.state, content.model_config, keep, ranks)


def begin(folder: Path, step: int, tensors: dict[str, Tensor], ranks: Ranks) -> Draft:
    """Make room for a checkpoint that is written aside, and share the writing out.

    Raises:
        CheckpointNotSaved: when there is none.
    """
    target = folder / folder_name(step)

    def make() -> Path:
        try:
            _make_way(target)
            remove_leftovers(folder)  # what stays is named when the checkpoint is committed
            folder.mkdir(exist_ok=True)
            return new_partial(folder, step)
        except OSError as error:
            raise _refused(target, error, 0) from error

    return Draft(target, step, ranks.first(make), plan_index(tensors, ranks))


def write_tensors(draft: Draft, tensors: dict[str, Tensor], rank: int) -> Files:
    """Write what the draft asks of this rank; returns its file, if it has one.

    Raises:
        CheckpointNotSaved: when the file system refuses.
    """
    own, file = dict[str, Tensor](), tensor_file(rank)
    for name, saved in draft.index.tensors.items():
        if offsets := [piece.offsets for piece in saved.pieces if piece.file == file]:
            shards = local_shards(tensors[name])
            own |= {key_of(name, at): shards[at] for at in offsets}
    if not own:
        return {}
    try:
        return {file: write_tensor_file(draft.partial / file, own)}
    except OSError as error:
        needed = sum(tensor.numel() * tensor.element_size() for tensor in own.values())
        raise _refused(draft.target, error, needed) from error


def commit(
    draft: Draft,
    write: Callable[[], Files],
    state: SavedState,
    model_config: ModelConfig,
    keep: int,
    ranks: Ranks,
) -> Saved:
    """Make a checkpoint of what every rank writes; `write` returns when this rank's is written.

    Raises:
        CheckpointNotSaved: on every rank, when the file system refuses.
    """
    try:
        files = {name: entry for some in ranks.each(write) for name, entry in some.items()}
        return ranks.first(lambda: _publish(draft, files, state, model_config, keep))
    except CheckpointNotSaved:
        if ranks.is_first:
            shutil.rmtree(draft.partial, ignore_errors=True)
        raise


def _publish(
    draft: Draft, files: Files, state: SavedState, model_config: ModelConfig, keep: int
) -> Saved:
    folder = draft.target.parent
    try:
        write_records(draft, files, state, model_config)
        rename(draft)
    except OSError as error:
        raise _refused(draft.target, error, 0) from error
    return Saved(draft.target, (*remove_leftovers(folder), *prune(folder, keep)))


def write_records(draft: Draft, files: Files, state: SavedState, model_config: ModelConfig) -> None:
    """Write all that is not tensors, the manifest last."""
    model = dump_model_config(model_config)
    write_json(draft.partial / MODEL, model)
    write_json(draft.partial / STATE, state.model_dump(exclude_none=True))
    write_text(draft.partial / INDEX, draft.index.dump())
    digest = hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()
    write_manifest(draft.partial, draft.step, digest, files)
    sync_folder(draft.partial)


def rename(draft: Draft) -> None:
    """Give the folder its name: from now on it is a checkpoint."""
    draft.partial.rename(draft.target)
    sync_folder(draft.target.parent)


def dump_model_config(config: ModelConfig) -> dict[str, Any]:  # Any: pydantic's own result
    """Return the configuration as JSON can hold it: the infinite time-step limit becomes text."""
    low, high = config.time_step_limit
    return config.model_dump(mode="json") | {"time_step_limit": [str(low), str(high)]}


def _make_way(target: Path) -> None:
    """Set a damaged checkpoint of the same step aside.

    Raises:
        CheckpointNotSaved: when it is whole.
    """
    if not target.exists():
        return
    try:
        verify(target)
    except DamagedCheckpoint:
        set_aside(target)
        return
    raise CheckpointNotSaved(f"{target} is a complete checkpoint and is never overwritten")


def _refused(target: Path, error: OSError, needed: int) -> CheckpointNotSaved:
    """Say why there is no checkpoint."""
    needs = f"it needs {needed:,} bytes, " if needed else ""
    reason = error.strerror or error
    return CheckpointNotSaved(
        f"checkpoint {target} was not saved: {reason}; {needs}{_free(target.parent)}"
    )


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free:,} are free"
    except OSError:
        return f"and {folder} is gone"
