"""Commands around reinforcement learning: conversations, evaluation, verdicts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemotron.commands.shared import CommandGroup, Overrides, RecipeFile, ReplaceFile
from nemotron.limits import MOST_CHATS
from nemotron.terminal import print_text

if TYPE_CHECKING:
    from nemotron.model.hybrid import HybridLM
    from nemotron.posttrain.config import RlConfig

app = CommandGroup(
    help="Write, answer and judge tasks of environments; `train` learns from them.",
    no_args_is_help=True,
)


@app.command("chats", epilog="Example: nemotron rl chats arith_chain mcqa@1 --out chats.jsonl")
def rl_chats(
    tasks: Annotated[
        list[str],
        typer.Argument(
            help="Environments, with their level behind an @; `+tools` adds a calculator.",
            metavar="NAME[@LEVEL]...",
        ),
    ],
    out: Annotated[Path, typer.Option(help="File of JSON lines to write.")],
    count: Annotated[
        int, typer.Option(min=1, max=MOST_CHATS, help="Conversations of each environment.")
    ] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the tasks.")] = 1,
    thinking: Annotated[bool, typer.Option(help="Write the reasoning, too.")] = True,
    text: Annotated[
        bool,
        typer.Option("--text", help="Write prompt and answer as one text, for pre-training."),
    ] = False,
    mistakes: Annotated[
        float, typer.Option(min=0, max=1, help="Share of answers that earn nothing.")
    ] = 0.0,
    held_out: Annotated[
        float,
        typer.Option(min=0, max=0.99, help="Share of tasks left to evaluations, as in the recipe."),
    ] = 0.0,
    overwrite: ReplaceFile = False,
) -> int:
    """Write conversations in which tasks are answered, as data for fine-tuning."""
    from nemotron.data.rewrite.rows import check_file
    from nemotron.exit_codes import DONE
    from nemotron.posttrain.demonstrations import Manner, TaskSet, write_chats

    sets = [TaskSet.read(text) for text in tasks]
    check_file(out, (), overwrite=overwrite)
    manner = Manner(thinking, text, mistakes, held_out)
    written = write_chats(sets, out, count=count, seed=seed, manner=manner)
    print_text(f"{written} {'texts' if text else 'conversations'} in {out}")
    return DONE


@app.command(
    "pivots",
    epilog="Example: nemotron rl pivots recipes/super/swe.yaml chats.jsonl --model runs/sft "
    "--out pivots.jsonl",
)
def rl_pivots(
    recipe: RecipeFile,
    trajectories: Annotated[
        Path, typer.Argument(help="Conversations with tools, as JSON lines.", metavar="FILE")
    ],
    out: Annotated[Path, typer.Option(help="File of rows to write.")],
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Run, checkpoint or export; default: the run that RECIPE is, or init_from of it."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=2, max=1000, help="Answers to each turn.")] = 8,
    max_reward: Annotated[
        float, typer.Option(min=0, max=1, help="Largest mean reward of a pivot.")
    ] = 1.0,
    overwrite: ReplaceFile = False,
) -> int:
    """Find turns of expert trajectories at which a model is sometimes right (PivotRL)."""
    from nemotron.data.rewrite.rows import check_file
    from nemotron.exit_codes import DONE
    from nemotron.posttrain.pivots import write_pivots

    config = _rl_config(recipe, overrides or [])
    check_file(out, [str(trajectories)], overwrite=overwrite)
    place = _place(model, recipe, config)
    found = write_pivots(
        _load(place, config), config, trajectories, out, samples=samples, max_reward=max_reward
    )
    print_text(f"{found}, in {out}")
    return DONE


@app.command(
    "evaluate",
    epilog="Example: nemotron rl evaluate recipes/tiny/assistant/rl.yaml --model runs/sft",
)
def rl_evaluate(
    recipe: RecipeFile,
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Run, checkpoint or export; default: the run that RECIPE is, or init_from of it."
        ),
    ] = None,
    budget: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Tokens after which reasoning is closed; repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="SVG file for the curve of reward over budget.")
    ] = None,
) -> int:
    """Answer the held-out tasks of a recipe and print the mean reward of each environment."""
    from nemotron.exit_codes import DONE
    from nemotron.outputs import check_new
    from nemotron.posttrain.evaluate import evaluate

    given = [f"rollout.reasoning_budget={max(budget)}"] if budget else []
    config = _rl_config(recipe, [*(overrides or []), *given])
    place = _place(model, recipe, config)
    for key, path in (("--out", out), ("--plot", plot)):
        if path is not None:
            check_new(path, key)
    evaluate(_load(place, config), config, budget or (), out=out, plot=plot)
    return DONE


@app.command("reverify", epilog="Example: nemotron rl reverify runs/arith-rl")
def rl_reverify(
    run: Annotated[
        Path,
        typer.Argument(help="Run with rollouts or suites, or folder of nemotron evaluate --suite."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the answers with their new verdicts.")
    ] = None,
) -> int:
    """Judge stored answers again; the exit code is 1 if a verdict changes."""
    from nemotron.posttrain.reverify import reverify
    from nemotron.posttrain.suites.reverify import answer_files, reverify_answers
    from nemotron.run.files import RunFiles

    files = [] if any(RunFiles(run).rollouts.glob("step-*.jsonl")) else answer_files(run)
    if files:
        return reverify_answers(files, out)
    return reverify(_rl_config(run, []), run, out)


def _rl_config(recipe: Path, overrides: list[str]) -> "RlConfig":
    """Return a recipe's configuration; refuse one of another stage."""
    from nemotron.errors import UserError
    from nemotron.posttrain.config import RlConfig
    from nemotron.recipe.load import load_recipe
    from nemotron.recipe.read import place_of

    loaded = load_recipe(recipe, overrides)
    if not isinstance(loaded.config, RlConfig):
        place = place_of(loaded.places, ("stage",), str(loaded.path))
        rule = "is not for this command, which takes recipes of stage rl."
        raise UserError(rule, key="stage", value=loaded.config.stage, where=place)
    return loaded.config


def _place(model: str | None, recipe: Path, config: "RlConfig") -> str:
    """Return the model that a command is about, and print it where no option names it."""
    from nemotron.errors import UserError

    if model is not None:
        return model
    place = str(recipe) if recipe.is_dir() else config.init_from
    if place is None:
        raise UserError("no model is named; give --model, or init_from in the recipe.")
    print_text(f"model {place}")
    return place


def _load(place: str, config: "RlConfig") -> "HybridLM":
    """Return a model; refuse one of another vocabulary than the recipe's tokenizer."""
    from nemotron.errors import UserError
    from nemotron.loading import load

    model = load(place, ops=config.ops)
    if model.config.vocab_size != config.model.vocab_size:
        raise UserError(
            f"has a vocabulary of {model.config.vocab_size}, but model.vocab_size = "
            f"{config.model.vocab_size} in the recipe; give a model with its tokenizer.",
            key="--model",
            value=place,
        )
    return model
