"""Quantizing a trained model into a folder that inference engines read."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nemotron.errors import UserError
from nemotron.exit_codes import DONE, FAILED
from nemotron.files import write_json, write_text
from nemotron.hf.export import MAX_SHARD_BYTES, failed_beside, run_selfcheck, write_folder
from nemotron.hf.folder import is_exported, read_folder
from nemotron.hf.formats import RELEASED
from nemotron.hf.hub import find_folder
from nemotron.hf.import_ import write_run
from nemotron.hf.names import disk_parameters
from nemotron.hf.quantized.assignment import Quantized, quantized_formats
from nemotron.hf.quantized.digest import digest_of_constants
from nemotron.hf.quantized.layouts import LayoutName
from nemotron.hf.read_scales import read_scales
from nemotron.hf.source import CheckpointSource, open_checkpoint
from nemotron.outputs import check_output, output_folder, publish, writing_beside
from nemotron.precision.static import attach, store_weights
from nemotron.quantize.decide import Decision, Wanted, decide
from nemotron.quantize.pareto import draw
from nemotron.quantize.record import as_json, lines
from nemotron.quantize.size import size_of
from nemotron.quantize.subject import Subject
from nemotron.run.files import RunFiles
from nemotron.terminal import print_text

COMMAND = "quantize"
REPORT = "quantization.json"
CURVE = "pareto.svg"


def quantize(
    model: Path,
    out: Path,
    wanted: Wanted,
    *,
    recipe: Path | None = None,
    overrides: Sequence[str] = (),
    layout: LayoutName = "modelopt",
    device: str = "auto",
    overwrite: bool = False,
    check: bool = True,
) -> int:
    """Write a model with quantized layers, and a report; returns the exit code.

    The exit code is 1 if the check of the written folder has not passed.

    Raises:
        UserError: when there is no model or text, the target may not be written, or the model does
            not fit the formats; nothing is written.
    """
    origin, target = find_folder(model), output_folder(out)
    with _source(origin, target, recipe, overwrite=overwrite) as source:
        run = source.run
        if run is None:
            raise UserError(
                "is not inside a run, so its tokenizer is unknown; give a run's folder.",
                where=str(model),
            )
        for skipped in source.skipped:
            print_text(str(skipped))
        _check_target(target, source, run, overwrite=overwrite)
        subject = Subject(source.info.folder, recipe, overrides, device)
        decision = decide(subject, wanted)
        store_weights(subject.model, decision.scales)
        attach(subject.model, decision.scales)
        size, compared = size_of(subject.model, decision.table), subject.compare()
        with writing_beside(target, COMMAND) as partial:
            digest = _write(source, run, partial, decision, layout)
            write_json(partial / REPORT, as_json(wanted, decision, size, compared))
            if decision.found is not None:
                write_text(partial / CURVE, draw(decision.found))
            failed = check and not run_selfcheck(partial, source, digest)
            if failed:
                target = failed_beside(target)
            publish(partial, target, COMMAND)
    for line in lines(size, decision.observed, compared):
        print_text(line)
    if failed:
        print_text(f"failed: the check did not pass; the files are in {target} for inspection")
        return FAILED
    print_text(f"quantized into {target}; {REPORT} there holds all figures")
    return DONE


@contextmanager
def _source(
    model: Path, target: Path, recipe: Path | None, *, overwrite: bool
) -> Iterator[CheckpointSource]:
    """Yield a run's checkpoint; that of an exported folder is made beside the target, and removed.

    Raises:
        UserError: when there is none, or a folder cannot be quantized.
    """
    if not is_exported(model):
        yield open_checkpoint(model)
        return
    if recipe is None:
        raise UserError(
            "brings no recipe, which names the text; give one: --recipe FILE.", where=str(model)
        )
    check_output(target, COMMAND, [model], overwrite=overwrite)
    if read_scales(model) is not None:
        raise UserError(
            "is quantized already; give the model that it was made from.", where=str(model)
        )
    with writing_beside(target.with_name(f"{target.name}.source"), COMMAND) as partial:
        loaded = read_folder(model)
        for note in (*loaded.notes, *write_run(model, loaded, RunFiles(partial))):
            print_text(f"note: {note}")
        del loaded
        yield open_checkpoint(partial)


def _check_target(
    target: Path, source: CheckpointSource, run: RunFiles, *, overwrite: bool
) -> None:
    if target.resolve().is_relative_to(source.info.folder.resolve().parent):
        raise UserError(
            "is inside the checkpoints folder; choose another folder.", where=str(target)
        )
    inputs = [source.info.folder, run.path]
    check_output(target, COMMAND, inputs, overwrite=overwrite)
    check_output(failed_beside(target), COMMAND, inputs, overwrite=True)


def _write(
    source: CheckpointSource, run: RunFiles, folder: Path, decision: Decision, layout: LayoutName
) -> str | None:
    """Write the model; returns the digest of its scales, which the check compares."""
    quantized = Quantized(decision.scales.linears, decision.scales.cache, layout)
    formats = source.formats(RELEASED)
    formats = quantized_formats(formats, quantized, disk_parameters(source.config, formats))
    write_folder(
        source,
        run,
        folder,
        formats=formats,
        max_shard_bytes=MAX_SHARD_BYTES,
        quantized=quantized,
    )
    return digest_of_constants(disk_parameters(source.config, formats))
