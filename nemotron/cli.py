"""The command line: each command calls one function, and user errors become one sentence."""

import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
import typer.main
from typer.core import TyperCommand

from nemotron import __version__
from nemotron.errors import UserError
from nemotron.exit_codes import DONE, FAILED, INTERRUPTED, MEANINGS, STOPPED, WRONG_INPUT
from nemotron.terminal import fault_of, mute, print_text, say

if TYPE_CHECKING:
    from nemotron.data.loader import TrainingData

DEBUG = "--debug"


def _debug(
    debug: Annotated[
        bool, typer.Option(DEBUG, help="Print the traceback of an error, too.")
    ] = False,
) -> None:
    """Declare the option that every command has; `run` reads it."""


class Command(TyperCommand):
    """A command with the options that every command has."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:  # Any: those of typer
        super().__init__(*arguments, **keywords)
        probe = typer.Typer(add_completion=False)
        probe.command()(_debug)
        [option] = typer.main.get_command(probe).params
        option.expose_value = False
        self.params.append(option)


class CommandGroup(typer.Typer):
    """Commands that share the options of `Command`."""

    def command(self, name: str | None = None, **keywords: Any) -> Any:  # Any: those of typer
        return super().command(name, cls=Command, **keywords)


app = CommandGroup(
    name="nemotron",
    help="Train hybrid Mamba-2 / attention / mixture-of-experts language models.",
    epilog="Exit codes: " + "; ".join(f"{code} {text}" for code, text in MEANINGS.items()) + ".",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
recipe_app = CommandGroup(help="Show and check recipes without running them.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")
data_app = CommandGroup(help="Prepare data and inspect it before a run.", no_args_is_help=True)
app.add_typer(data_app, name="data")

checkpoint_app = CommandGroup(help="Work on checkpoints.", no_args_is_help=True)
app.add_typer(checkpoint_app, name="checkpoint")

RecipeFile = Annotated[
    Path,
    typer.Argument(
        help="Recipe file (.yaml), or a shipped recipe such as tiny/pretrain.", metavar="RECIPE"
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Values that override the recipe, such as schedule.peak=3e-4.",
        metavar="[KEY=VALUE]...",
    ),
]


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"nemotron {__version__}")
        raise typer.Exit


@app.command(epilog="Example: nemotron train recipes/tiny/pretrain.yaml schedule.peak=1e-3")
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the newest complete checkpoint, if any.")
    ] = False,
    stop_at: Annotated[
        int | None, typer.Option(min=1, help="Save and stop after this step (exit code 75).")
    ] = None,
    allow_changed: Annotated[
        list[str] | None,
        typer.Option(help="Key that may differ from the resumed run; repeatable."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and print what would run; write nothing.")
    ] = False,
) -> int:
    """Train a model from a recipe."""
    from nemotron.parallel.runtime import Launch
    from nemotron.recipe.load import load_recipe

    Launch.of_this_process()  # reports a mistake in the environment before the recipe is read
    loaded = load_recipe(recipe, overrides or [])
    if resume and not loaded.overrides(("name",), ("output",)):
        from nemotron.run.folder import check_recipe_home

        check_recipe_home(recipe, loaded.config.run_path)
    if dry_run:
        from nemotron.train.start import dry_run as describe

        return describe(loaded.config, loaded.trained)
    from nemotron.loading import read_weights
    from nemotron.train.start import train as run

    return run(
        loaded.config,
        loaded.trained,
        resume=resume,
        stop_at=stop_at,
        recipe_path=" ".join([str(recipe), *(overrides or [])]),
        read_initial=read_weights,
        allow_changed=allow_changed or [],
    )


@recipe_app.command("show", epilog="Example: nemotron recipe show recipes/tiny/pretrain.yaml")
def recipe_show(
    recipe: RecipeFile,
    overrides: Overrides = None,
    precision: Annotated[
        bool, typer.Option("--precision", help="Print the format of every linear layer instead.")
    ] = False,
) -> int:
    """Print the resolved recipe and where each value comes from."""
    from nemotron.recipe.load import load_recipe
    from nemotron.recipe.show import show

    loaded = load_recipe(recipe, overrides or [])
    if precision:
        from nemotron.train.start import describe_precision

        for line in describe_precision(loaded.config):
            print_text(line)
        return DONE
    print_text(show(loaded))
    return DONE


@recipe_app.command("check", epilog="Example: nemotron recipe check recipes/nano/pretrain.yaml")
def recipe_check(recipe: RecipeFile, overrides: Overrides = None) -> int:
    """Check a recipe and print the result in one line."""
    from nemotron.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    print_text(f"{recipe}: valid; it creates the run {loaded.config.output}/{loaded.config.name}")
    return DONE


@recipe_app.command(
    "diff",
    epilog="Example: nemotron recipe diff recipes/nano/pretrain.yaml recipes/super/pretrain.yaml",
)
def recipe_diff(first: RecipeFile, second: RecipeFile) -> int:
    """Print the values that differ between two recipes."""
    from nemotron.recipe.load import load_recipe
    from nemotron.recipe.show import diff

    for key, a, b in diff(load_recipe(first), load_recipe(second)):
        print_text(f"{key}: {a} -> {b}")
    return DONE


@recipe_app.command("list", epilog="Example: nemotron recipe list")
def recipe_list() -> int:
    """List the recipes that ship with the package."""
    from nemotron.recipe.shipped import names, summary

    width = max(map(len, names()))
    for name in names():
        print(f"{name:<{width}}  {summary(name)}".rstrip())
    return DONE


@recipe_app.command("copy", epilog="Example: nemotron recipe copy tiny/pretrain")
def recipe_copy(
    name: Annotated[str, typer.Argument(help="Name, as recipe list prints it.", metavar="NAME")],
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("recipes"),
    launch: Annotated[
        bool, typer.Option("--launch", help="Also copy the start scripts, into the folder launch.")
    ] = False,
) -> int:
    """Copy a shipped recipe, with the files that it extends, to change it."""
    from nemotron.recipe.load import load_recipe
    from nemotron.recipe.shipped import copy, path_of

    files = load_recipe(path_of(name)).files
    for path in copy(files, out, Path("launch") if launch else None):
        print_text(str(path))
    return DONE


@recipe_app.command("schema", epilog="Example: nemotron recipe schema > recipes/schema.json")
def recipe_schema() -> int:
    """Print the JSON schema of recipes, for editors."""
    from nemotron.recipe.show import schema

    print(schema(), end="")
    return DONE


@data_app.command(
    "prepare",
    epilog="Example: nemotron data prepare texts/ 'more/*.jsonl.gz' --out data/letters",
)
def data_prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders or patterns (JSON lines, parquet, text; also .gz and .zst), or "
            "a data set hf://OWNER/NAME.",
            metavar="SOURCE...",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    tokenizer: Annotated[
        str, typer.Option(help="The word embedded, a tokenizer.json, or its folder.")
    ] = "embedded",
    eod_token: Annotated[str, typer.Option(help="Token at the end of each document.")] = "</s>",
    column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    filters: Annotated[
        list[str] | None,
        typer.Option(
            "--filter", help="Keep only rows that pass, such as 'score >= 0.5' or 'lang == en'."
        ),
    ] = None,
    separator: Annotated[
        str | None,
        typer.Option(help=r"Text that separates documents in a text file; \n is a line break."),
    ] = None,
    hold_out: Annotated[
        float,
        typer.Option(
            min=0, max=0.999, help="Share of documents held out for validation, chosen by hash."
        ),
    ] = 0.01,
    chat: Annotated[
        bool, typer.Option("--chat", help="Read rows as conversations with messages and tools.")
    ] = False,
    messages: Annotated[str, typer.Option(help="Column that holds the messages.")] = "messages",
    tools: Annotated[str, typer.Option(help="Column that holds the tools.")] = "tools",
    thinking: Annotated[bool, typer.Option(help="Keep the reasoning of conversations.")] = True,
    all_thinking: Annotated[
        bool, typer.Option("--all-thinking", help="Keep the reasoning of earlier turns as well.")
    ] = False,
    subset: Annotated[str | None, typer.Option(help="Subset of an hf:// data set.")] = None,
    split: Annotated[str, typer.Option(help="Split of an hf:// data set.")] = "train",
    revision: Annotated[str | None, typer.Option(help="Revision of an hf:// data set.")] = None,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Read an hf:// data set without storing it.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of processes; default: one per core.")
    ] = None,
    max_bad_rows: Annotated[
        int, typer.Option(min=0, help="Stop if there are more unreadable rows than this.")
    ] = 100,
    max_row_mib: Annotated[
        int,
        typer.Option(min=1, help="Longest row of JSON lines; a longer row counts as unreadable."),
    ] = 256,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder OUT.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read the list of inputs and write nothing.")
    ] = False,
) -> int:
    """Turn text or conversations into token shards; repeat a stopped command to continue it."""
    from nemotron.data.prepare.command import prepare
    from nemotron.data.prepare.options import ChatOptions, HubOptions, PrepareOptions

    chats = ChatOptions(
        messages_column=messages,
        tools_column=tools,
        enable_thinking=thinking,
        truncate_history_thinking=not all_thinking,
    )
    options = PrepareOptions(
        column=column,
        filters=tuple(filters or ()),
        separator=separator and separator.replace(r"\n", "\n").replace(r"\t", "\t"),
        eod_token=eod_token,
        validation_fraction=hold_out,
        max_row_bytes=max_row_mib << 20,
        hub=HubOptions(subset=subset, split=split, revision=revision, streaming=streaming),
        chat=chats if chat else None,
    )
    return prepare(
        sources,
        out,
        tokenizer=tokenizer,
        options=options,
        workers=workers,
        max_bad_rows=max_bad_rows,
        overwrite=overwrite,
        dry_run=dry_run,
    )


@data_app.command("inspect", epilog="Example: nemotron data inspect recipes/tiny/pretrain.yaml")
def data_inspect(
    target: Annotated[
        Path,
        typer.Argument(help="Recipe (.yaml), prepared folder, or shard without its file ending."),
    ],
    overrides: Overrides = None,
    step: Annotated[int, typer.Option(min=0, help="Step whose rows to show.")] = 0,
    rows: Annotated[int, typer.Option(min=0, help="Number of rows to show.")] = 2,
    documents: Annotated[
        int, typer.Option(min=1, help="Documents of each source to read for statistics.")
    ] = 100_000,
    check: Annotated[
        bool, typer.Option("--check", help="Read every byte and check checksums, indices and ids.")
    ] = False,
    plots: Annotated[Path | None, typer.Option(help="Folder to write plots to.")] = None,
    tokenizer: Annotated[
        str, typer.Option(help="For a folder or shard: the word embedded, or a tokenizer.json.")
    ] = "embedded",
    eod_token: Annotated[
        str | None, typer.Option(help="For a shard without a manifest; default: </s>.")
    ] = None,
    seq_len: Annotated[
        int, typer.Option(min=2, help="For a folder or shard: tokens in a row.")
    ] = 512,
) -> int:
    """Show the data: sources, document lengths, duplicates, and rows as text."""
    from nemotron.data.inspect import inspect, open_path

    if target.suffix in (".yaml", ".yml"):
        data = _recipe_data(target, overrides)
    else:
        with tempfile.TemporaryDirectory() as cache:
            data = open_path(
                target, tokenizer=tokenizer, eod_token=eod_token, seq_len=seq_len, cache=cache
            )
            return inspect(
                data, step=step, rows=rows, documents=documents, check=check, plots=plots
            )
    return inspect(data, step=step, rows=rows, documents=documents, check=check, plots=plots)


@data_app.command("plan", epilog="Example: nemotron data plan recipes/tiny/pretrain.yaml")
def data_plan(recipe: RecipeFile, overrides: Overrides = None) -> int:
    """Show how many tokens and passes a run needs of each source.

    The exit code is 1 if a source has too many passes.
    """
    from nemotron.data.plan import print_plan

    return print_plan(_recipe_data(recipe, overrides))


def _recipe_data(recipe: Path, overrides: list[str] | None) -> "TrainingData":
    from nemotron.recipe.load import load_recipe
    from nemotron.train.pretraining import open_data
    from nemotron.train.schedule import plan_training

    config = load_recipe(recipe, overrides or []).pretraining
    return open_data(config, plan_training(config))


@app.command(
    "plan", epilog="Example: nemotron plan recipes/super/pretrain.yaml --gpus 64 --hardware h100"
)
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpus: Annotated[
        int, typer.Option(min=1, help="Number of accelerators, or of processes on a CPU.")
    ] = 8,
    hardware: Annotated[
        str, typer.Option(help="One of h100, h200, b200, b300, gb200, gb300 and cpu.")
    ] = "h100",
    search: Annotated[
        bool, typer.Option("--search", help="List the fastest valid layouts that fit into memory.")
    ] = False,
    efficiency: Annotated[
        float | None,
        typer.Option(help="Share of the peak that products reach, instead of the fitted model."),
    ] = None,
    check_memory: Annotated[
        bool,
        typer.Option(
            "--check-memory", help="Trace a block of each kind and compare with the formula."
        ),
    ] = False,
    tokens: Annotated[
        float | None, typer.Option(help="Tokens to train on, instead of the recipe's phases.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Predict the memory, communication and speed of a layout.

    The exit code is 1 if the layout breaks a rule or does not fit into memory.
    """
    from nemotron.plan.command import plan as run
    from nemotron.recipe.load import load_recipe

    return run(
        load_recipe(recipe, overrides or []).pretraining,
        gpus=gpus,
        hardware=hardware,
        search=search,
        efficiency=efficiency,
        check_memory=check_memory,
        tokens=tokens,
        as_text=not as_json,
    )


@app.command(epilog="Example: nemotron doctor")
def doctor(
    ranks: Annotated[
        bool, typer.Option("--ranks", help="Compare the ranks that torchrun or srun started.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(min=1, help="With --ranks: seconds to wait for the other ranks.")
    ] = 120.0,
) -> int:
    """Print what this machine can run, and why it cannot run the rest."""
    if ranks:
        from nemotron.doctor.ranks import compare_ranks

        return compare_ranks(timeout)
    from nemotron.doctor.machine import doctor as run

    return run()


@app.command(epilog='Example: nemotron generate runs/tiny --prompt "def read("')
def generate(
    model: Annotated[Path, typer.Argument(help="Run, checkpoint or exported folder.")],
    prompt: Annotated[list[str], typer.Option(help="Text to continue; repeatable.")],
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Largest number of tokens to add.")
    ] = 128,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0 always takes the most likely token.")
    ] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(help="Sample only from this many most likely tokens.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample only from tokens with this total probability.")
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Sample only from tokens with this share of the likeliest one."),
    ] = None,
    repeat_penalty: Annotated[
        float, typer.Option(help="Above 1, tokens that are in the text already become less likely.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text before which to end; repeatable.")
    ] = None,
    think_budget: Annotated[
        int | None, typer.Option(min=0, help="Tokens after which </think> is put into the answer.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed that makes sampling repeatable.")] = None,
    stream: Annotated[bool, typer.Option(help="Print tokens while generating.")] = True,
    device: Annotated[str, typer.Option(help="One of auto, cpu and cuda.")] = "auto",
    recipe_ops: Annotated[
        bool, typer.Option(help="Use the backends that the run's recipe names.")
    ] = True,
) -> int:
    """Continue one or more prompts."""
    from nemotron.generate.command import generate as run
    from nemotron.generate.sampling import Sampling
    from nemotron.loading import load_with_tokenizer
    from nemotron.loading import recipe_ops as read_ops

    sampling = Sampling(
        temperature, top_k, top_p, seed, min_p=min_p, repetition_penalty=repeat_penalty
    )
    ops = read_ops(model) if recipe_ops else None
    loaded, tokenizer = load_with_tokenizer(model, ops=ops)
    return run(
        loaded,
        tokenizer,
        prompt,
        sampling,
        max_new_tokens=max_new_tokens,
        stop=stop or (),
        reasoning_budget=think_budget,
        stream=stream,
        device=device,
    )


@app.command("check-parity", epilog="Example: nemotron check-parity runs/tiny --length 100")
def check_parity(
    model: Annotated[Path, typer.Argument(help="Run, checkpoint or exported folder.")],
    length: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Tokens of a prompt; repeatable. Default: 100, 1000."),
    ] = None,
    rows: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Prompts at a time; repeatable. Default: 1, 8."),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate after each.")] = 32,
    device: Annotated[str, typer.Option(help="One of auto, cpu and cuda.")] = "auto",
) -> int:
    """Compare probabilities while generating with those in training.

    The exit code is 1 if they differ by more than 5 % on average.
    """
    from nemotron.device import find_device
    from nemotron.generate.parity import report
    from nemotron.loading import load, recipe_ops

    loaded = load(model, find_device(device), ops=recipe_ops(model))
    return report(loaded, length or (100, 1000), rows or (1, 8), new_tokens)


@app.command(epilog="Example: nemotron export runs/tiny --out exported/tiny")
def export(
    run: Annotated[Path, typer.Argument(help="Run or checkpoint folder.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; default: RUN/export.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder OUT.")] = False,
    mamba_fp32: Annotated[
        bool, typer.Option("--mamba-fp32", help="Write A_log, D and dt_bias in float32.")
    ] = False,
    check: Annotated[bool, typer.Option(help="Run the self-check at the end.")] = True,
    max_shard_gb: Annotated[
        float, typer.Option(min=0.001, max=1e6, help="Largest file size, in 10^9 bytes.")
    ] = 5.0,
) -> int:
    """Export a model to a Hugging Face folder, and check it in a fresh process."""
    from nemotron.hf.export import export as run_export
    from nemotron.hf.formats import MAMBA_FP32, RELEASED

    return run_export(
        run,
        out,
        overwrite=overwrite,
        formats=MAMBA_FP32 if mamba_fp32 else RELEASED,
        check=check,
        max_shard_bytes=int(max_shard_gb * 1e9),
    )


@app.command("import", epilog="Example: nemotron import exported/tiny --out runs/imported")
def import_(
    folder: Annotated[Path, typer.Argument(help="Folder in Hugging Face's layout.")],
    out: Annotated[Path, typer.Option(help="Run folder to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder OUT.")] = False,
) -> int:
    """Import a Hugging Face folder as a run, to train it further or export it again."""
    from nemotron.hf.import_ import import_ as run_import

    return run_import(folder, out, overwrite=overwrite)


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


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command and exit with one of the codes of `nemotron.exit_codes`."""
    code = run(arguments)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is left to be cleaned up
    if "nemotron.parallel.runtime" in sys.modules:  # else no rank was ever started
        from nemotron.parallel.runtime import leave

        leave(code, together=code in (DONE, STOPPED))
    sys.exit(code)


def run(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code; whatever goes wrong becomes one sentence."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        result = app(words, standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else DONE
    except typer.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BaseException as error:  # those of libraries in Rust are no Exception
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        sentence, code = _describe(error, words)
        if DEBUG in words:
            traceback.print_exception(error)
        return _report(sentence, code) if sentence else code


def _describe(error: BaseException, words: Sequence[str]) -> tuple[str, int]:
    """Return the sentence about an error, empty when there is nothing to say, and the exit code."""
    if isinstance(error, UserError):
        return str(error), WRONG_INPUT
    if isinstance(error, typer.TyperException):
        if not (message := _message(error)):
            return "", WRONG_INPUT  # no command was given, and the help has been shown
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "nemotron"
        return f"{message} See {command} --help.", WRONG_INPUT
    # typer turns a broken pipe that it sees into an exit
    cause = error.__context__ if isinstance(error, SystemExit) else error
    if isinstance(cause, OSError) and (fault := _unwritable(cause)) is not None:
        mute(sys.stdout)
        if isinstance(fault, BrokenPipeError):
            return "", DONE  # the reader of our output has what it wanted
        return f"failed: standard output cannot be written: {fault.strerror}.", FAILED
    from nemotron.guard import describe

    return describe(error, words)


def _unwritable(error: OSError) -> OSError | None:
    """Return the error if standard output is what it is about."""
    return error if isinstance(error, BrokenPipeError) else fault_of(sys.stdout)


def _message(error: typer.TyperException) -> str:
    format_message = getattr(error, "format_message", None)
    text = " ".join(str(format_message() if format_message else error).split())
    return text if not text or text.endswith(".") else f"{text}."


def _report(sentence: str, code: int) -> int:
    who = "nemotron"
    if "nemotron.parallel.runtime" in sys.modules:
        from nemotron.parallel.runtime import leave_word, speaker

        leave_word(sentence)
        who = speaker()
    say(f"{who}: {sentence}")
    return code
