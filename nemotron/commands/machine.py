"""Commands about machines: what a run would need, and what this one can do."""

from typing import Annotated

import typer

from nemotron.commands.shared import CommandGroup, Overrides, RecipeFile

app = CommandGroup()


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

    loaded = load_recipe(recipe, overrides or [])
    return run(
        loaded.updates,
        loaded.trained.plan(loaded.config),
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
    bench: Annotated[
        bool,
        typer.Option("--bench", help="Measure the machine, and how near operations come to it."),
    ] = False,
) -> int:
    """Print what this machine can run, and why it cannot run the rest."""
    if ranks:
        from nemotron.doctor.ranks import compare_ranks

        return compare_ranks(timeout)
    if bench:
        from nemotron.doctor.bench import bench as measure

        return measure()
    from nemotron.doctor.machine import doctor as run

    return run()
