"""Quantizing a trained model into a folder that inference engines read."""

from collections.abc import Sequence
from pathlib import Path

from nemotron.errors import UserError
from nemotron.exit_codes import DONE, FAILED
from nemotron.files import write_json, write_text
from nemotron.hf.export import MAX_SHARD_BYTES, failed_beside, run_selfcheck, write_folder
from nemotron.hf.formats import RELEASED
from nemotron.hf.names import disk_parameters
from nemotron.hf.quantized.assignment import Quantized, quantized_formats
from nemotron.hf.quantized.digest import digest_of_constants
from nemotron.hf.quantized.layouts import LayoutName
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
    """Write a run's model with quantized layers, and a report; returns the exit code.

    The exit code is 1 if the check of the written folder has not passed.

    Raises:
        UserError: when there is no checkpoint or text, the target may not be written, or the model
            does not fit the formats; nothing is written.
    """
    source = open_checkpoint(model)
    for skipped in source.skipped:
        print_text(str(skipped))
    if source.run is None:
        raise UserError(
            "is not inside a run, so its tokenizer is unknown; give a run's folder.",
            where=str(model),
        )
    target = output_folder(out)
    _check_target(target, source, source.run, overwrite=overwrite)
    subject = Subject(source.info.folder, recipe, overrides, device)
    decision = decide(subject, wanted)
    store_weights(subject.model, decision.scales)
    attach(subject.model, decision.scales)
    size, compared = size_of(subject.model, decision.table), subject.compare()
    with writing_beside(target, COMMAND) as partial:
        digest = _write(source, source.run, partial, decision, layout)
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
