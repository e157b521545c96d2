"""Writing a checkpoint as a folder in the layout of the released Nemotron 3 checkpoints."""

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nemotron.checkpoint.write import CheckpointNotSaved
from nemotron.children import module_command
from nemotron.data.tokenizer import Tokenizer
from nemotron.errors import UserError
from nemotron.exit_codes import DONE, FAILED
from nemotron.files import write_json, write_text
from nemotron.hf.config import check_readable, to_hf
from nemotron.hf.folder import CONFIG, is_exported, read_folder
from nemotron.hf.formats import RELEASED, Formats, Plain
from nemotron.hf.hub import check_name, find_folder, push_folder
from nemotron.hf.import_ import write_run
from nemotron.hf.model_card import HERE, model_card
from nemotron.hf.names import DiskParameter, disk_parameters, disk_tensors
from nemotron.hf.quantized.assignment import Quantized, quantized_formats
from nemotron.hf.quantized.declare import SIDECAR, declare_compressed, declare_modelopt
from nemotron.hf.quantized.digest import digest_of_constants
from nemotron.hf.readers import limits
from nemotron.hf.shards import write_shards
from nemotron.hf.source import CheckpointSource, open_checkpoint
from nemotron.hf.tokenizer_files import read_tokenizer, special_ids, write_tokenizer_files
from nemotron.outputs import check_output, output_folder, publish, writing_beside
from nemotron.run.files import RunFiles
from nemotron.terminal import print_text

COMMAND = "export"
MAX_SHARD_BYTES = 5_000_000_000
"""Size that a shard does not exceed, as on the hub."""


def export(
    run: str | Path,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    formats: Formats = RELEASED,
    quantized: Quantized | None = None,
    check: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    push: str | None = None,
    trunk_only: bool = False,
) -> int:
    """Write the newest complete checkpoint of a run in the layout of released checkpoints.

    `out` is the run's folder `export` when absent. All is written beside it and takes its place
    once the check, in a process of its own, has passed. `quantized` names the layers that are
    written in FP8 or NVFP4, with their scales. `push` is a name on the Hub, to which the folder is
    then uploaded. `trunk_only` leaves out what text correction adds to a model. Returns the exit
    code: 1 if the check has not passed.

    Raises:
        UserError: when the run has no checkpoint, the target may not be written, or engines could
            not read a layer as it would be quantized; nothing is written.
    """
    if push is not None:
        check_name(push)
    source = open_checkpoint(Path(run))
    if trunk_only:
        source = source.trunk
    for skipped in source.skipped:
        print_text(str(skipped))
    if source.run is None:
        raise UserError(
            "is not inside a run, so its tokenizer is unknown; give a run's folder.", where=str(run)
        )
    target = output_folder(out if out is not None else source.run.path / "export")
    check_readable(source.config)
    check_target(target, source, overwrite=overwrite)
    check_output(failed_beside(target), COMMAND, _inputs(source), overwrite=True)
    formats = source.formats(formats)
    if quantized is not None:
        plain = disk_parameters(source.config, formats)
        formats = quantized_formats(formats, quantized, plain)
    with writing_beside(target, COMMAND) as partial:
        tensors, size = write_folder(
            source,
            source.run,
            partial,
            formats=formats,
            max_shard_bytes=max_shard_bytes,
            quantized=quantized,
            name=push or HERE,
        )
        print_text(f"wrote {tensors:,} tensors, {size:,} bytes, of {source.info.folder}")
        digest = digest_of_constants(disk_parameters(source.config, formats))
        failed = check and not run_selfcheck(partial, source, digest)
        if failed:
            target = failed_beside(target)
        publish(partial, target, COMMAND)
    if failed:
        print_text(f"failed: the check did not pass; the files are in {target} for inspection")
        return FAILED
    print_text(f"exported to {target}")
    for limit in limits(source.config):
        print_text(f"note: {limit}")
    if push is not None:
        print_text(f"uploaded to {push_folder(target, push)}")
    return DONE


@contextmanager
def opened_as_run(place: Path, out: Path | None, *, overwrite: bool) -> Iterator[Path]:
    """Yield a run to export: `place` itself or, of a folder in Hugging Face's layout, an import.

    The import lies beside `out` for as long as it is needed. `place` may be a name on the Hub.

    Raises:
        UserError: when the folder cannot be imported, or `out` is missing or may not be written.
    """
    origin = find_folder(place)
    if not is_exported(origin):
        yield origin
        return
    if out is None:
        raise UserError("is needed for a model that is not a run.", key="--out")
    target = output_folder(out)
    check_output(target, COMMAND, [origin], overwrite=overwrite)
    loaded = read_folder(origin)
    with writing_beside(target.with_name(f"{target.name}.imported"), COMMAND) as partial:
        known = origin.resolve().name if place.exists() else place.name.partition("@")[0]
        run = RunFiles(partial / known)
        run.path.mkdir()
        try:
            notes = write_run(origin, loaded, run)
        except CheckpointNotSaved as problem:
            raise UserError(f"cannot be imported: {problem}.", where=str(partial)) from None
        for note in (*loaded.notes, *notes):
            print_text(f"note: {note}")
        yield run.path


def check_target(
    target: Path, source: CheckpointSource, *, overwrite: bool, command: str = COMMAND
) -> None:
    """Check that the folder may be written, before anything is.

    Raises:
        UserError: when it is taken, lies among the run's checkpoints, or holds the run.
    """
    if target.resolve().is_relative_to(source.info.folder.resolve().parent):
        raise UserError(
            "is inside the checkpoints folder; export to another folder.", where=str(target)
        )
    check_output(target, command, _inputs(source), overwrite=overwrite)


def _inputs(source: CheckpointSource) -> list[Path]:
    return [source.info.folder] + ([source.run.path] if source.run else [])


def failed_beside(target: Path) -> Path:
    """Return the folder of an export that did not pass its check."""
    return target.with_name(f"{target.name}.failed")


def write_folder(
    source: CheckpointSource,
    run: RunFiles,
    folder: Path,
    *,
    formats: Formats,
    max_shard_bytes: int,
    quantized: Quantized | None = None,
    name: str = HERE,
) -> tuple[int, int]:
    """Write every file of the export into an existing folder; returns tensors and their bytes.

    Raises:
        UserError: when the run's tokenizer is missing or does not fit.
    """
    config = source.config
    for note in write_tokenizer_files(run, folder, config, is_trained=source.is_trained):
        print_text(f"note: {note}")
    tokenizer = Tokenizer(read_tokenizer(run.tokenizer))
    values = to_hf(config) | special_ids(tokenizer, config)
    if isinstance(formats.default, Plain):
        values["torch_dtype"] = str(formats.default.dtype).removeprefix("torch.")
    parameters = disk_parameters(config, formats)
    if quantized is not None:
        values["quantization_config"] = _declare(folder, quantized, parameters)
    write_json(folder / CONFIG, values)
    write_text(folder / "README.md", model_card(source, parameters, name, quantized))
    size = write_shards(folder, parameters, source.reader(), max_shard_bytes)
    return len(disk_tensors(parameters)), size


def _declare(
    folder: Path, quantized: Quantized, parameters: Sequence[DiskParameter]
) -> dict[str, object]:
    """Return `quantization_config`; ModelOpt's layout has a file of its own beside it."""
    if quantized.layout == "compressed-tensors":
        return declare_compressed(quantized, parameters)
    config, sidecar = declare_modelopt(quantized, parameters)
    write_json(folder / SIDECAR, sidecar)
    return config


def run_selfcheck(folder: Path, source: CheckpointSource, digest: str | None = None) -> bool:
    """Check the folder against its checkpoint in a fresh process, which prints what it found.

    `digest` is that of the scales of a quantized model.
    """
    command = [*module_command("nemotron.hf.selfcheck"), str(folder), str(source.info.folder)]
    if digest is not None:
        command.append(digest)
    finished = subprocess.run(command, check=False)
    return finished.returncode == 0
