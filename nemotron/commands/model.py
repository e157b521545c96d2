"""Commands that take a trained model: generate, check, convert."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from nemotron.commands.answers import AnswerOptions
from nemotron.commands.decoding import DecodingOptions
from nemotron.commands.shared import (
    CommandGroup,
    Device,
    Language,
    Model,
    Overrides,
    refuse_beside,
    refuse_without,
)
from nemotron.commands.suites import SuiteOptions
from nemotron.limits import MOST_ROWS, MOST_TOKENS
from nemotron.merge.coefficients import EMA_DECAY

app = CommandGroup()

SCORE, SCORE_ROWS, COST = "fisher", 32, "weights"
"""Of a search, by default."""


MAX_SHARD_GB = 5.0
"""Largest file of an export, in 10^9 bytes, by default."""


class MambaDecode(StrEnum):
    """How Mamba-2 layers read one token."""

    recurrent = "recurrent"
    replay = "replay"


class Layout(StrEnum):
    """Layouts of quantized folders."""

    modelopt = "modelopt"
    compressed_tensors = "compressed-tensors"


checkpoint_app = CommandGroup(help="Work on checkpoints.", no_args_is_help=True)
app.add_typer(checkpoint_app, name="checkpoint")


@app.command(epilog='Example: nemotron generate runs/tiny --prompt "def read("')
def generate(
    model: Model,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; repeatable.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="File of texts: JSON lines (.jsonl) with the field prompt, or lines."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="JSON lines of answers to --prompts to write; default: the output."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Answer only the prompts that OUT does not answer yet.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=MOST_TOKENS, help="Largest number of tokens to add.")
    ] = 128,
    stream: Annotated[bool, typer.Option(help="Print tokens while generating.")] = True,
    device: Device = "auto",
    recipe_ops: Annotated[
        bool, typer.Option(help="Use the backends that the run's recipe names.")
    ] = True,
    language: Language = None,
    *,
    answers: AnswerOptions,
    decoding: DecodingOptions,
) -> int:
    """Continue one or more prompts."""
    from nemotron.errors import UserError
    from nemotron.generate.command import Continuation, generate_file
    from nemotron.generate.command import generate as run
    from nemotron.loading import fix_language, load_with_tokenizer, stop_ids
    from nemotron.loading import recipe_ops as read_ops

    if bool(prompt) == (prompts is not None):
        raise UserError("the prompts are missing, or given twice; give --prompt or --prompts FILE.")
    if prompts is None and (out is not None or resume):
        rule = "need --prompts FILE; give it, or leave them out."
        raise UserError(rule, key="--out and --resume")
    if resume and out is None:
        raise UserError("needs the file to continue; give --out FILE.", key="--resume")
    sampling = answers.sampling
    ops = read_ops(model) if recipe_ops else None
    loaded, tokenizer = load_with_tokenizer(model, ops=ops)
    fix_language(loaded, language)
    ends = stop_ids(model, loaded.config)
    wanted = Continuation(
        sampling,
        max_new_tokens,
        answers.stop or (),
        ends,
        answers.think_budget,
        device,
        decoding.speculation,
        decoding.formats,
    )
    if prompts is not None:
        return generate_file(loaded, tokenizer, prompts, out, wanted, resume=resume)
    return run(loaded, tokenizer, prompt or [], wanted, stream=stream)


@app.command(epilog="Example: nemotron evaluate runs/tiny --suite arithmetic --out scores")
def evaluate(
    model: Model,
    overrides: Overrides = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="Recipe whose held-out text is used; default: that of the model's run."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="JSON file to write; with --suite or --against, a folder."),
    ] = None,
    language: Language = None,
    device: Device = "auto",
    *,
    suites: SuiteOptions,
) -> int:
    """Print the loss of a model on held-out text by domain, or how well it solves tasks.

    Overrides change the recipe of the text, such as evaluation.tokens=100000.
    """
    from nemotron.errors import UserError
    from nemotron.evaluate.command import Text, Wanted, evaluate_suites
    from nemotron.evaluate.command import evaluate as run

    text = Text(recipe, overrides or ())
    suites.refuse_idle()
    if not suites.is_asked:
        if suites.resume:
            rule = "continues an evaluation on suites; name them with --suite."
            raise UserError(rule, key="--resume")
        return run(model, text, out=out, device=device, language=language)
    if language is not None:
        rule = "is for held-out text; leave it out with --suite and --against."
        raise UserError(rule, key="--language", value=language)
    if suites.resume and out is None:
        raise UserError("needs the folder to continue; give --out FOLDER.", key="--resume")
    wanted = Wanted(suites.plan(), text, suites.against, out, suites.resume, device)
    return evaluate_suites(model, wanted)


@app.command("check-parity", epilog="Example: nemotron check-parity runs/tiny --length 100")
def check_parity(
    model: Model,
    length: Annotated[
        list[int] | None,
        typer.Option(
            min=1, max=MOST_TOKENS, help="Tokens of a prompt; repeatable. Default: 100, 1000."
        ),
    ] = None,
    rows: Annotated[
        list[int] | None,
        typer.Option(min=1, max=4096, help="Prompts at a time; repeatable. Default: 1, 8."),
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(min=1, max=MOST_TOKENS, help="Tokens to generate after each.")
    ] = 32,
    mamba_decode: Annotated[
        MambaDecode,
        typer.Option(help="replay uses exact operations on both sides; every bit must agree."),
    ] = MambaDecode.recurrent,
    device: Device = "auto",
) -> int:
    """Compare probabilities while generating with those in training.

    The exit code is 1 if they differ by more than 5 % on average, or at all with replay.
    """
    from nemotron.device import find_device
    from nemotron.generate.parity import report
    from nemotron.loading import load, recipe_ops

    loaded = load(model, find_device(device), ops=recipe_ops(model))
    return report(loaded, length or (100, 1000), rows or (1, 8), new_tokens, mamba_decode.value)


@app.command(epilog="Example: nemotron export runs/tiny --out exported/tiny")
def export(
    run: Annotated[
        Path, typer.Argument(help="Run, checkpoint or exported folder, or OWNER/NAME of the Hub.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder to write; default: RUN/export.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder OUT.")] = False,
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder OUT.")] = False,
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder OUT.")] = False,
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
        last_tokens or (), last or (), step or (), check_shape(shape), ema_decay, search
    )
    return run_merge(run, out, choice, device=device, overwrite=overwrite)


@app.command(epilog="Example: nemotron quantize runs/tiny --preset super_nvfp4 --out small/tiny")
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    overrides: Overrides = None,
    preset: Annotated[
        str | None, typer.Option(help="Formats by kind of layer, such as fp8 and super_nvfp4.")
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=32.0, help="Search formats of so many bits a weight, in place of a preset."
        ),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(help="Quantized folder whose formats and scales are taken, after QAD."),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Pattern of layers that stay in bfloat16; repeatable."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Scales of NVFP4 weights: max, mse or four_over_six; default: preset's."),
    ] = None,
    kv_cache: Annotated[
        bool | None,
        typer.Option(help="Write FP8 scales of keys and values; default: as the preset."),
    ] = None,
    rows: Annotated[
        int, typer.Option(min=1, max=MOST_ROWS, help="Rows of text to calibrate on.")
    ] = 128,
    score: Annotated[
        str, typer.Option(help="Sensitivity for --bits: fisher (one backward) or kl.")
    ] = SCORE,
    score_rows: Annotated[
        int, typer.Option(min=1, max=MOST_ROWS, help="Rows of text for --bits.")
    ] = SCORE_ROWS,
    cost: Annotated[
        str,
        typer.Option(
            help="Mean that --bits is: over weights, or active ones, of a token's experts."
        ),
    ] = COST,
    inputs: Annotated[
        str, typer.Option(help="Reach of the scales of inputs: max, percentile or mse.")
    ] = "max",
    every_expert: Annotated[
        bool,
        typer.Option("--every-expert", help="Calibrate every expert on all tokens, too."),
    ] = False,
    recipe: Annotated[
        Path | None,
        typer.Option(help="Recipe whose text is used; default: that of the model's run."),
    ] = None,
    layout: Annotated[
        Layout, typer.Option(help="Names and scales on disk, by the tool whose readers want them.")
    ] = Layout.modelopt,
    check: Annotated[bool, typer.Option(help="Run the self-check at the end.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder OUT.")] = False,
    device: Device = "auto",
) -> int:
    """Quantize a model to FP8 and NVFP4, and compare it with what it was on held-out text."""
    from nemotron.quantize.command import quantize as run_quantize
    from nemotron.quantize.decide import Wanted

    if bits is None:
        searched = {"score": score, "score_rows": score_rows, "cost": cost}
        defaults = {"score": SCORE, "score_rows": SCORE_ROWS, "cost": COST}
        refuse_without("--bits", searched, defaults)
    wanted = Wanted(
        preset,
        bits,
        like,
        keep or (),
        weights,
        kv_cache,
        rows,
        score,
        score_rows,
        cost,
        inputs,
        every_expert,
    )
    return run_quantize(
        model,
        out,
        wanted,
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
