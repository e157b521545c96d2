"""Writing a checkpoint as a folder in the layout of the released Nemotron 3 checkpoints."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from nemotron.errors import UserError
from nemotron.files import sync_folder, write_json, write_text
from nemotron.hf.config import to_hf
from nemotron.hf.folder import CONFIG
from nemotron.hf.model_card import model_card
from nemotron.hf.names import disk_tensors
from nemotron.hf.shards import INDEX, write_shards
from nemotron.hf.source import CheckpointSource
from nemotron.hf.tokenizer_files import write_tokenizer_files

MAX_SHARD_BYTES = 5_000_000_000
"""Size that a shard does not exceed, as on the hub."""


def check_target(target: Path, source: CheckpointSource, *, overwrite: bool) -> None:
    """Check that the folder may be written, before anything is.

    Raises:
        UserError: when it is taken, or lies among the run's checkpoints.
    """
    if target.resolve().is_relative_to(source.info.folder.resolve().parent):
        raise UserError(f"{target} lies among the checkpoints; export to another folder.")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent} does not exist; create it, or export elsewhere.")
    refuse_taken(target, INDEX, overwrite=overwrite)


def refuse_taken(target: Path, mark: str, *, overwrite: bool) -> None:
    """Refuse a folder that holds something, unless it may be replaced and holds `mark`.

    Raises:
        UserError: saying what would help.
    """
    if target.is_file():
        raise UserError(f"{target} is a file; give the name of a folder.")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{target} exists already; add --overwrite to replace it.")
    if not (target / mark).exists():
        raise UserError(f"{target} has no {mark}, so it is not replaced; choose another folder.")


def write_folder(
    source: CheckpointSource, run: Path, folder: Path, *, mamba_fp32: bool, max_shard_bytes: int
) -> tuple[int, int]:
    """Write every file of the export into an existing folder; returns tensors and their bytes.

    Raises:
        UserError: when the run's tokenizer is missing or does not fit.
    """
    write_tokenizer_files(run, folder, source.config)
    write_json(folder / CONFIG, to_hf(source.config))
    write_text(folder / "README.md", model_card(source))
    tensors = disk_tensors(source.config, mamba_fp32=mamba_fp32)
    return len(tensors), write_shards(folder, tensors, source.reader(), max_shard_bytes)


def run_selfcheck(folder: Path, source: CheckpointSource) -> bool:
    """Check the folder against its checkpoint in a fresh process, which prints what it found."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "nemotron.hf.selfcheck", str(folder)]
    finished = subprocess.run(
        [*command, str(source.info.folder)], env=os.environ | {"PYTHONPATH": path}, check=False
    )
    return finished.returncode == 0


def publish(partial: Path, target: Path) -> None:
    """Put the finished folder in its place; what was there goes when the new one has come."""
    sync_folder(partial)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)
