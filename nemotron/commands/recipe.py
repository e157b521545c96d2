"""Commands that show and check recipes."""

from pathlib import Path
from typing import Annotated

import typer

from nemotron.commands.shared import CommandGroup, Overrides, RecipeFile
from nemotron.exit_codes import DONE
from nemotron.terminal import print_text

app = CommandGroup(help="Show and check recipes without running them.", no_args_is_help=True)


@app.command("show", epilog="Example: nemotron recipe show recipes/tiny/pretrain.yaml")
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


@app.command("check", epilog="Example: nemotron recipe check recipes/nano/pretrain.yaml")
def recipe_check(recipe: RecipeFile, overrides: Overrides = None) -> int:
    """Check a recipe; print the result, and which programs an export would not be for."""
    from nemotron.hf.readers import limits
    from nemotron.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    print_text(f"{recipe}: valid; it creates the run {loaded.config.output}/{loaded.config.name}")
    for limit in limits(loaded.config.model):
        print_text(f"note: an export is not for {limit}")
    return DONE


@app.command(
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


@app.command("list", epilog="Example: nemotron recipe list")
def recipe_list() -> int:
    """List the recipes that ship with the package."""
    from nemotron.recipe.shipped import names, summary

    width = max(map(len, names()))
    for name in names():
        print(f"{name:<{width}}  {summary(name)}".rstrip())
    return DONE


@app.command("copy", epilog="Example: nemotron recipe copy tiny/pretrain")
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


@app.command("schema", epilog="Example: nemotron recipe schema > recipes/schema.json")
def recipe_schema() -> int:
    """Print the JSON schema of recipes, for editors."""
    from nemotron.recipe.show import schema

    print(schema(), end="")
    return DONE
