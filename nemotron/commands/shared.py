"""What all commands have in common: the option --debug, and the arguments that name a recipe."""

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
        metavar="[KEY=VALUE]...",
    ),
]
