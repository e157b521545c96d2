"""What `nemotron export` and `nemotron import` do."""

import shutil
from pathlib import Path

from nemotron.checkpoint.write import CheckpointNotSaved
from nemotron.errors import UserError
from nemotron.hf.export import (
    MAX_SHARD_BYTES,
    check_target,
    publish,
    refuse_taken,
    run_selfcheck,
    write_folder,
)
from nemotron.hf.folder import CONFIG, is_exported, read_folder
from nemotron.hf.import_ import write_run
from nemotron.hf.source import open_checkpoint
from nemotron.hf.tokenizer_files import KEPT_FOLDER


def export(
    run: str | Path,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    mamba_fp32: bool = False,
    check: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Write the newest whole checkpoint of a run in the layout of released checkpoints.

    `out` is the run's folder `export` when absent. All is written beside it and takes its place
    once the check, in a process of its own, has passed. Returns the exit code: 1 if it has not.

    Raises:
        UserError: when there is no checkpoint or the target may not be written; nothing is.
    """
    source = open_checkpoint(Path(run))
    for line in source.skipped:
        print(line)
    if source.run is None:
        raise UserError(f"{run} lies in no run, so its tokenizer is unknown; give a run's folder.")
    target = Path(out) if out is not None else source.run / "export"
    check_target(target, source, overwrite=overwrite)
    partial = _fresh(target)
    try:
        tensors, size = write_folder(
            source, source.run, partial, mamba_fp32=mamba_fp32, max_shard_bytes=max_shard_bytes
        )
        print(f"wrote {tensors:,} tensors, {size:,} bytes, of {source.info.folder}")
        failed = check and not run_selfcheck(partial, source)
        if failed:
            target = target.with_name(f"{target.name}.failed")
        publish(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if failed:
        print(f"failed: the check did not pass; the files are in {target} for inspection")
        return 1
    print(f"exported to {target}")
    return 0


def import_(folder: str | Path, out: str | Path, *, overwrite: bool = False) -> int:
    """Make a run out of a folder of safetensors: a checkpoint, its tokenizer and provenance.

    Returns the exit code.

    Raises:
        UserError: when the folder is not exactly what its `config.json` says, or `out` is taken;
            nothing is written.
    """
    origin, target = Path(folder), Path(out)
    if not is_exported(origin):
        raise UserError(
            f"{origin / CONFIG} does not exist; give a folder in Hugging Face's layout."
        )
    refuse_taken(target, KEPT_FOLDER, overwrite=overwrite)
    loaded = read_folder(origin)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _fresh(target)
    except OSError as error:
        raise UserError(f"{target} cannot be made: {error.strerror}; choose another.") from error
    try:
        notes = write_run(origin, loaded, partial)
        publish(partial, target)
    except CheckpointNotSaved as problem:
        print(f"failed: {problem}")
        return 1
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for note in (*loaded.notes, *notes):
        print(f"note: {note}")
    print(f"imported {len(loaded.weights):,} tensors to {target}")
    return 0


def _fresh(target: Path) -> Path:
    """Return an empty folder beside the target; what a killed start left there goes."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    return partial
