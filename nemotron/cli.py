"""The command line: each command calls one function, and user errors become one sentence."""

import functools
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
import typer.main

from nemotron import __version__
from nemotron.commands import (
    conversion,
    correct,
    data,
    harness,
    machine,
    model,
    recipe,
    report,
    rl,
    score,
    serve,
)
from nemotron.commands.shared import DEBUG, CommandGroup, Overrides, RecipeFile
from nemotron.distribution import other_owners
from nemotron.errors import RunFailed, UserError
from nemotron.exit_codes import DONE, FAILED, INTERRUPTED, MEANINGS, STOPPED, WRONG_INPUT
from nemotron.terminal import fault_of, mute, say

if TYPE_CHECKING:
    from nemotron.recipe.load import Recipe

app = CommandGroup(
    name="nemotron",
    help="Train hybrid Mamba-2 / attention / mixture-of-experts language models.",
    epilog="Exit codes: " + "; ".join(f"{code} {text}" for code, text in MEANINGS.items()) + ".",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


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
    panel: Annotated[
        bool | None,
        typer.Option(
            "--panel/--plain",
            help="Show steps as a panel, or as lines; default: a panel in a terminal.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and print what would run; write nothing.")
    ] = False,
) -> int:
    """Train a model from a recipe."""
    from nemotron.parallel.runtime import Launch
    from nemotron.recipe.load import load_recipe

    # reports a mistake in the environment before the recipe is read
    Launch.of_this_process(meets=not dry_run)
    loaded = load_recipe(recipe, overrides or [])
    if recipe.is_dir():
        loaded = _in_its_folder(loaded, recipe, overrides or [])
    elif resume and not loaded.overrides(("name",), ("output",)):
        from nemotron.run.folder import check_recipe_home

        check_recipe_home(recipe, loaded.config.run_path)
    if dry_run:
        return _dry_run(loaded, resume=resume, allow_changed=allow_changed or [])
    from nemotron.loading import read_initial
    from nemotron.recipe.show import origin
    from nemotron.train.start import train as run

    return run(
        loaded.config,
        loaded.trained,
        resume=resume,
        stop_at=stop_at,
        origin=origin(loaded, [str(recipe), *(overrides or [])]),
        read_initial=read_initial,
        allow_changed=allow_changed or [],
        panel=panel,
    )


def _in_its_folder(loaded: "Recipe", folder: Path, overrides: list[str]) -> "Recipe":
    """Return the recipe of a run for the folder that it lies in, which may have been moved."""
    from nemotron.recipe.load import load_recipe

    home = folder.resolve()
    named = loaded.overrides(("name",), ("output",))
    if named or loaded.config.run_path.resolve() == home:
        return loaded
    return load_recipe(folder, [*overrides, f"output={home.parent}", f"name={home.name}"])


def _dry_run(loaded: "Recipe", *, resume: bool, allow_changed: list[str]) -> int:
    from nemotron.loading import read_initial
    from nemotron.plan.command import estimate
    from nemotron.train.start import dry_run

    return dry_run(
        loaded.config,
        loaded.trained,
        resume=resume,
        read_initial=read_initial,
        allow_changed=allow_changed,
        estimate=estimate,
    )


app.add_typer(recipe.app, name="recipe")
app.add_typer(data.app, name="data")
app.add_typer(rl.app, name="rl")
app.add_typer(machine.app)
app.add_typer(model.app)
app.add_typer(conversion.app)
app.add_typer(harness.app)
app.add_typer(correct.app)
app.add_typer(report.app)
app.add_typer(score.app)
app.add_typer(serve.app)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command and exit with one of the codes of `nemotron.exit_codes`."""
    for name in other_owners():
        say(
            f"warning: the distribution {name} also brings a package nemotron, and may have "
            "replaced files of this one; install only one of the two, and that one anew."
        )
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
        result = command_line()(words, standalone_mode=False)
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


@functools.cache
def command_line() -> Callable[..., Any]:  # Any: what a command returns
    """Return all commands, which a process that runs several builds once."""
    return typer.main.get_command(app)


def _describe(error: BaseException, words: Sequence[str]) -> tuple[str, int]:
    """Return the sentence about an error, empty when there is nothing to say, and the exit code."""
    if isinstance(error, UserError):
        return str(error), error.exit_code
    if isinstance(error, RunFailed):
        return f"failed: {error}.", FAILED
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
    return text if not text or text.endswith((".", "?")) else f"{text}."


def _report(sentence: str, code: int) -> int:
    who = "nemotron"
    if "nemotron.parallel.runtime" in sys.modules:
        from nemotron.parallel.runtime import leave_word, speaker

        leave_word(sentence)
        who = speaker()
    say(f"{who}: {sentence}")
    return code
