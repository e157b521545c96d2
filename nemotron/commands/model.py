"""Commands that use a trained model: generate, evaluate, compare decoding with training."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from nemotron.commands.answers import AnswerOptions
from nemotron.commands.decoding import DecodingOptions
from nemotron.commands.endings import EndingOptions
from nemotron.commands.shared import (
    CommandGroup,
    Device,
    Language,
    Model,
    Overrides,
)
from nemotron.commands.suites import SuiteOptions
from nemotron.limits import MOST_TOKENS

app = CommandGroup()


class MambaDecode(StrEnum):
    """How Mamba-2 layers read one token."""

    recurrent = "recurrent"
    replay = "replay"


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
    endings: EndingOptions,
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
        stop=answers.stop or (),
        stop_ids=ends,
        min_new_tokens=endings.min_new_tokens,
        own_stop_ids=endings.stop_token_id or (),
        include_stop=endings.include_stop,
        ignore_eos=endings.ignore_eos,
        special_tokens=endings.special_tokens,
        reasoning_budget=answers.think_budget,
        device=device,
        speculation=decoding.speculation,
        formats=decoding.formats,
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
    wanted = Wanted(
        suites.plan(), text, against=suites.against, out=out, resume=suites.resume, device=device
    )
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
