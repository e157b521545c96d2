"""Commands that write a trained model in another form: export, import, merge, quantize."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from nemotron.commands.quantization import FormatOptions
from nemotron.commands.shared import (
    CommandGroup,
    Device,
    Model,
    Overrides,
    ReplaceFolder,
    refuse_beside,
    refuse_without,
)
from nemotron.merge.coefficients import EMA_DECAY

app = CommandGroup()
checkpoint_app = CommandGroup(help="Work on checkpoints.", no_args_is_help=True)
app.add_typer(checkpoint_app, name="checkpoint")


MAX_SHARD_GB = 5.0
"""Largest file of an export, in 10^9 bytes, by default."""


class Layout(StrEnum):
    """Layouts of quantized folders."""

    modelopt = "modelopt"
    compressed_tensors = "compressed-tensors"


@app.command(epilog="Example: nemotron export runs/tiny --out exported/tiny")
def export(
    run: Annotated[
        Path, typer.Argument(help="Run, checkpoint or exported folder, or OWNER/NAME of the Hub.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder to write; default: RUN/export.")] = None,
    overwrite: ReplaceFolder = False,
    mamba_fp32: Annotated[
        bool, typer.Option("--mamba-fp32", help="Write A_log, D and dt_bias in float32.")
    ] = False,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write the adapters alone, in the layout of PEFT.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="Model that PEFT attaches the adapters to (--adapter).")
    ] = None,
    trunk_only: Annotated[
        bool,
        typer.Option("--trunk-only", help="Leave out what joins candidates, and heads of edits."),
    ] = False,
    check: Annotated[bool, typer.Option(help="Run the self-check at the end.")] = True,
    max_shard_gb: Annotated[
        float, typer.Option(min=0.001, max=1e6, help="Largest file size, in 10^9 bytes.")
    ] = MAX_SHARD_GB,
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Upload the folder to the Hub, with HF_TOKEN."),
    ] = None,
) -> int:
    """Export a model to a Hugging Face folder, and check it in a fresh process."""
    from nemotron.hf.export import export as run_export
    from nemotron.hf.export import opened_as_run
    from nemotron.hf.formats import MAMBA_FP32, RELEASED

    whole = {
        "mamba_fp32": mamba_fp32,
        "trunk_only": trunk_only,
        "no_check": not check,
        "max_shard_gb": max_shard_gb,
    }
    if adapter:
        from nemotron.hf.adapter import export_adapter

        defaults = dict.fromkeys(whole, False) | {"max_shard_gb": MAX_SHARD_GB}
        refuse_beside("--adapter", whole, defaults)
        return export_adapter(run, out, base=base, overwrite=overwrite, push=push)
    refuse_without("--adapter", {"base": base}, {"base": None})
    with opened_as_run(run, out, overwrite=overwrite) as place:
        return run_export(
            place,
            out,
            overwrite=overwrite,
            formats=MAMBA_FP32 if mamba_fp32 else RELEASED,
            check=check,
            max_shard_bytes=int(max_shard_gb * 1e9),
            push=push,
            trunk_only=trunk_only,
        )


@app.command("import", epilog="Example: nemotron import exported/tiny --out runs/imported")
def import_(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Folder in Hugging Face's layout, or OWNER/NAME or OWNER/NAME@REVISION on the Hub."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Run folder to write.")],
    overwrite: ReplaceFolder = False,
) -> int:
    """Import a Hugging Face folder as a run, to train it further or export it again."""
    from nemotron.hf.import_ import import_ as run_import

    return run_import(folder, out, overwrite=overwrite)


@app.command(epilog="Example: nemotron merge runs/tiny --last-tokens 400e3 --out runs/merged")
def merge(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[Path, typer.Option(help="Run folder to write.")],
    last_tokens: Annotated[
        list[float] | None,
        typer.Option(help="Average over this many last tokens; repeatable with --search."),
    ] = None,
    last: Annotated[
        list[int] | None,
        typer.Option(min=2, help="Average this many last checkpoints; repeatable with --search."),
    ] = None,
    step: Annotated[
        list[int] | None, typer.Option(help="Step of a checkpoint to average; repeatable.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="minus_sqrt, linear (as if the learning rate decayed), uniform or ema; "
            "default: minus_sqrt, with --search all."
        ),
    ] = None,
    ema_decay: Annotated[
        float, typer.Option(help="Factor from a checkpoint to the one before it (shape ema).")
    ] = EMA_DECAY,
    search: Annotated[
        bool, typer.Option("--search", help="Choose the window and shape by validation loss.")
    ] = False,
    overwrite: ReplaceFolder = False,
    device: Annotated[str, typer.Option(help="One of auto, cpu and cuda (--search).")] = "auto",
) -> int:
    """Average checkpoints of a run into a new run; default: all that it kept."""
    from nemotron.merge.command import Choice, check_shape
    from nemotron.merge.command import merge as run_merge

    if not search:
        refuse_without("--search", {"device": device}, {"device": "auto"})
        if shape != "ema":
            refuse_without("--shape ema", {"ema_decay": ema_decay}, {"ema_decay": EMA_DECAY})
    choice = Choice(
        last_tokens=last_tokens or (),
        last=last or (),
        steps=step or (),
        shape=check_shape(shape),
        ema_decay=ema_decay,
        search=search,
    )
    return run_merge(run, out, choice, device=device, overwrite=overwrite)


@app.command(epilog="Example: nemotron quantize runs/tiny --preset super_nvfp4 --out small/tiny")
def quantize(
    model: Model,
    *,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    overrides: Overrides = None,
    formats: FormatOptions,
    recipe: Annotated[
        Path | None,
        typer.Option(help="Recipe whose text is used; default: that of the model's run."),
    ] = None,
    layout: Annotated[
        Layout, typer.Option(help="Names and scales on disk, by the tool whose readers want them.")
    ] = Layout.modelopt,
    check: Annotated[bool, typer.Option(help="Run the self-check at the end.")] = True,
    overwrite: ReplaceFolder = False,
    device: Device = "auto",
) -> int:
    """Quantize a model to FP8 and NVFP4, and compare it with what it was on held-out text."""
    from nemotron.quantize.command import quantize as run_quantize

    return run_quantize(
        model,
        out,
        formats.read(),
        recipe=recipe,
        overrides=overrides or (),
        layout=layout.value,
        device=device,
        overwrite=overwrite,
        check=check,
    )


@checkpoint_app.command("convert", epilog="Example: nemotron checkpoint convert runs/tiny")
def checkpoint_convert(
    path: Annotated[Path, typer.Argument(help="Run, its checkpoints folder, or one checkpoint.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the new checkpoints; default: in place of the old ones."),
    ] = None,
) -> int:
    """Convert checkpoints of the old format, which held pickles; nothing in them is executed."""
    from nemotron.checkpoint.convert import convert

    return convert(path, out)
