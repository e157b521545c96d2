"""Commands that prepare data and inspect it."""

import functools
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemotron.commands import sentences
from nemotron.commands.conversations import ConversationOptions
from nemotron.commands.shared import (
    CommandGroup,
    Overrides,
    RecipeFile,
    ReplaceFile,
    ReplaceFolder,
    refuse_on,
)
from nemotron.commands.sources import (
    DataSetOptions,
    MaxBadRows,
    SpecialTokens,
    TextColumn,
    Tokenizer,
    Workers,
)
from nemotron.limits import MOST_MIB

if TYPE_CHECKING:
    from nemotron.data.loader import TrainingData

app = CommandGroup(help="Prepare data and inspect it before a run.", no_args_is_help=True)
app.add_typer(sentences.app)

TOKENIZER, SEQ_LEN = "embedded", 512
"""How `inspect` reads a folder or a shard, by default."""


@app.command(
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
    *,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    tokenizer: Tokenizer = "embedded",
    eod_token: Annotated[str, typer.Option(help="Token at the end of each document.")] = "</s>",
    column: TextColumn = "text",
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
    conversations: ConversationOptions,
    data_set: DataSetOptions,
    workers: Workers = None,
    max_bad_rows: MaxBadRows = 100,
    max_row_mib: Annotated[
        int,
        typer.Option(
            min=1,
            max=MOST_MIB,
            help="Longest row of JSON lines; a longer row counts as unreadable.",
        ),
    ] = 256,
    overwrite: ReplaceFolder = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read the list of inputs and write nothing.")
    ] = False,
) -> int:
    """Turn text or conversations into token shards; repeat a stopped command to continue it."""
    from nemotron.data.prepare.command import prepare
    from nemotron.data.prepare.options import PrepareOptions

    options = PrepareOptions(
        column=column,
        filters=tuple(filters or ()),
        separator=separator and _unescaped(separator),
        eod_token=eod_token,
        validation_fraction=hold_out,
        max_row_bytes=max_row_mib << 20,
        hub=data_set.read(),
        chat=conversations.read(),
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


@app.command(
    "tokenizer",
    epilog="Example: nemotron data tokenizer texts/ --vocab-size 8192 --out data/tokenizer.json",
)
def data_tokenizer(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders, patterns or data sets, as data prepare reads them.",
            metavar="SOURCE...",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The tokenizer.json to write.")],
    vocab_size: Annotated[int, typer.Option(help="Number of ids, special tokens included.")],
    special: SpecialTokens = None,
    column: TextColumn = "text",
    sample_mib: Annotated[
        int, typer.Option(min=1, help="Most MiB of input to learn from, spread over all of it.")
    ] = 1024,
    overwrite: ReplaceFile = False,
) -> int:
    """Train a byte-level BPE tokenizer on text."""
    from nemotron.data.prepare.learn_tokens import learn_tokenizer

    return learn_tokenizer(
        sources,
        out,
        vocab_size=vocab_size,
        specials=special or (),
        column=column,
        sample_bytes=sample_mib << 20,
        overwrite=overwrite,
    )


@app.command("inspect", epilog="Example: nemotron data inspect recipes/tiny/pretrain.yaml")
def data_inspect(
    target: Annotated[
        Path,
        typer.Argument(
            help="Recipe (.yaml, or the name of a shipped one), folder of a run, prepared folder "
            "or shard, or text."
        ),
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
    ] = TOKENIZER,
    eod_token: Annotated[
        str | None, typer.Option(help="For a shard without a manifest; default: </s>.")
    ] = None,
    seq_len: Annotated[
        int, typer.Option(min=2, help="For a folder or shard: tokens in a row.")
    ] = SEQ_LEN,
) -> int:
    """Show the data: sources, document lengths, duplicates, and rows as text."""
    from nemotron.data.inspect import inspect, open_path
    from nemotron.data.inspect_pairs import holds_pairs, inspect_pairs
    from nemotron.posttrain.correct.config import CorrectConfig
    from nemotron.recipe.load import load_recipe
    from nemotron.recipe.shipped import names, path_of

    show = functools.partial(
        inspect, step=step, rows=rows, documents=documents, check=check, plots=plots
    )
    is_there = any(os.path.exists(f"{target}{end}") for end in ("", ".bin", ".idx"))
    if not is_there and str(target) in names():
        target = path_of(str(target))
    given = {"tokenizer": tokenizer, "eod_token": eod_token, "seq_len": seq_len}
    defaults = {"tokenizer": TOKENIZER, "eod_token": None, "seq_len": SEQ_LEN}
    if target.suffix in (".yaml", ".yml") or (target / "recipe.yaml").is_file():
        refuse_on("a recipe", given, defaults)
        config = load_recipe(target, overrides or []).config
        if not isinstance(config, CorrectConfig):
            return show(_recipe_data(target, overrides))
        from nemotron.posttrain.correct.inspect import inspect_recipe

        _refuse_plots(plots)
        return inspect_recipe(config, step=step, rows=rows, documents=documents, check=check)
    if overrides:
        from nemotron.errors import UserError

        raise UserError(
            f"overrides are of a recipe, and {target} is none; leave {overrides[0]} out."
        )
    if holds_pairs(target):
        given |= {"step": step, "tokenizer": TOKENIZER}
        refuse_on("pairs", given, defaults | {"step": 0})
        _refuse_plots(plots)
        return inspect_pairs(
            target, tokenizer=tokenizer, rows=rows, documents=documents, check=check
        )
    with tempfile.TemporaryDirectory() as cache:
        data = open_path(
            target, tokenizer=tokenizer, eod_token=eod_token, seq_len=seq_len, cache=cache
        )
        return show(data)


@app.command("plan", epilog="Example: nemotron data plan recipes/tiny/pretrain.yaml")
def data_plan(recipe: RecipeFile, overrides: Overrides = None) -> int:
    """Show how many tokens and passes a run needs of each source.

    The exit code is 1 if a source has too many passes.
    """
    from nemotron.data.plan import print_plan

    return print_plan(_recipe_data(recipe, overrides))


def _unescaped(separator: str) -> str:
    return separator.replace(r"\r", "\r").replace(r"\n", "\n").replace(r"\t", "\t")


def _refuse_plots(plots: Path | None) -> None:
    if plots is not None:
        from nemotron.errors import UserError

        raise UserError("draws texts, not pairs; leave it out.", key="--plots", value=plots)


def _recipe_data(recipe: Path, overrides: list[str] | None) -> "TrainingData":
    from nemotron.recipe.load import load_recipe
    from nemotron.train.pretraining import open_data
    from nemotron.train.schedule import plan_training

    config = load_recipe(recipe, overrides or []).text
    return open_data(config, plan_training(config))
