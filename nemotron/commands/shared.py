"""What commands have in common: options, the arguments that name a recipe or a model."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.main
from typer.core import TyperCommand

DEBUG = "--debug"


def _debug(
    debug: Annotated[
        bool, typer.Option(DEBUG, help="Print the traceback of an error, too.")
    ] = False,
) -> None:
    """Declare the option that every command has; `run` reads it."""


@functools.cache
def _debug_option() -> Any:  # Any: typer's own kind of option
    probe = typer.Typer(add_completion=False)
    probe.command()(_debug)
    [option] = typer.main.get_command(probe).params
    option.expose_value = False
    return option


class Command(TyperCommand):
    """A command with the options that every command has."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:  # Any: those of typer
        super().__init__(*arguments, **keywords)
        self.params.append(_debug_option())


def _with_finite(function: Callable[..., int]) -> Callable[..., int]:
    """Return a command that refuses NaN, which limits let pass, and infinity as its numbers.

    Without such options this is the function itself.
    """
    parameters = inspect.signature(function).parameters
    numbers = [name for name, p in parameters.items() if "float" in str(p.annotation)]
    if not numbers:
        return function

    @functools.wraps(function)
    def call(**words: Any) -> int:  # Any: values of the options
        from nemotron.errors import UserError

        for name in numbers:
            given = words[name]
            for value in given if isinstance(given, list | tuple) else [given]:
                if isinstance(value, float) and not math.isfinite(value):
                    key = "--" + name.replace("_", "-")
                    raise UserError("must be finite.", key=key, value=value)
        return function(**words)

    return call


class CommandGroup(typer.Typer):
    """Commands that share the options of `Command`.

    A parameter whose type is a record stands for an option for each field of the record, so that
    options of several commands are declared once.
    """

    def command(self, name: str | None = None, **keywords: Any) -> Any:  # Any: those of typer
        register = super().command(name, cls=Command, **keywords)

        def declare(function: Callable[..., int]) -> Callable[..., int]:
            register(_with_finite(_spread(function)))
            return function

        return declare


def refuse_without(option: str, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse options that have no effect without another one, if they are not at their defaults.

    Both name options as parameters do, such as `max_new_tokens`.

    Raises:
        UserError: when one of `values` is not its default.
    """
    _refuse_given(f"without {option}; leave it out or add that.", values, defaults)


def refuse_beside(option: str, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse options that have no effect beside another one, as `refuse_without` does."""
    _refuse_given(f"beside {option}; leave one of them out.", values, defaults)


def refuse_on(what: str, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse options that have no effect on what is given, as `refuse_without` does."""
    _refuse_given(f"on {what}; leave it out.", values, defaults)


def _refuse_given(where: str, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    from nemotron.errors import UserError

    for name, value in values.items():
        if value != defaults[name]:
            key = "--" + name.replace("_", "-")
            raise UserError(f"has no effect {where}", key=key)


def _spread(function: Callable[..., int]) -> Callable[..., int]:
    """Return the function with the fields of its records as parameters of its own.

    Without a record this is the function itself.
    """
    signature = inspect.signature(function)
    spread: list[inspect.Parameter] = []
    records: dict[str, Any] = {}  # Any: classes of records
    for name, parameter in signature.parameters.items():
        record = parameter.annotation
        if not is_dataclass(record):
            spread.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        records[name] = record
        spread += [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=field.type,
            )
            for field in fields(record)
        ]

    if not records:
        return function

    @functools.wraps(function)
    def call(**words: Any) -> int:  # Any: values of the options
        for name, record in records.items():
            words[name] = record(**{field.name: words.pop(field.name) for field in fields(record)})
        return function(**words)

    call.__signature__ = signature.replace(parameters=spread)  # type: ignore[attr-defined]
    return call


RecipeFile = Annotated[
    Path,
    typer.Argument(
        help="Recipe file (.yaml), a shipped recipe such as tiny/pretrain, or the folder of a run.",
        metavar="RECIPE",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Values that override the recipe, such as schedule.peak=3e-4.",
        metavar="KEY=VALUE...",
    ),
]
Model = Annotated[
    Path,
    typer.Argument(
        help="Run, checkpoint, exported folder, or OWNER/NAME, with @REVISION or not, on the Hub."
    ),
]
ReplaceFile = Annotated[bool, typer.Option("--overwrite", help="Replace the file OUT.")]
ReplaceFolder = Annotated[bool, typer.Option("--overwrite", help="Replace the folder OUT.")]
Device = Annotated[str, typer.Option(help="One of auto, cpu and cuda.")]
Language = Annotated[
    str | None,
    typer.Option(help="Language whose experts read all tokens; default: the gate chooses."),
]
