"""Commands that prepare data and inspect it."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemotron.commands.shared import CommandGroup, Overrides, RecipeFile
from nemotron.limits import MOST_MIB

if TYPE_CHECKING:
    from nemotron.data.loader import TrainingData

RowSources = Annotated[
    list[str],
    typer.Argument(
        help="Files, folders or patterns: JSON lines or parquet; of text, each line is a row.",
        metavar="SOURCE...",
    ),
]
MaxBadRows = Annotated[
    int, typer.Option(min=0, help="Stop if there are more unreadable rows than this.")
]

OPTIONS_OF_CHATS = {
    "messages_column": "--messages",
    "tools_column": "--tools",
    "enable_thinking": "--no-thinking",
    "truncate_history_thinking": "--all-thinking",
    "reasoning_off_rate": "--no-reasoning",
    "reasoning_budget_rate": "--cut-reasoning",
}
"""Fields of `ChatOptions`, and the options that set them."""

app = CommandGroup(help="Prepare data and inspect it before a run.", no_args_is_help=True)


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
    reasoning_off_rate: Annotated[
        float,
        typer.Option(
            "--no-reasoning",
            min=0,
            max=1,
            help="Share of conversations to write without reasoning.",
        ),
    ] = 0.0,
    reasoning_budget_rate: Annotated[
        float,
        typer.Option(
            "--cut-reasoning",
            min=0,
            max=1,
            help="Share of conversations whose reasoning is cut off.",
        ),
    ] = 0.0,
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
        typer.Option(
            min=1,
            max=MOST_MIB,
            help="Longest row of JSON lines; a longer row counts as unreadable.",
        ),
    ] = 256,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder OUT.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read the list of inputs and write nothing.")
    ] = False,
) -> int:
    """Turn text or conversations into token shards; repeat a stopped command to continue it."""
    from nemotron.data.prepare.command import prepare
    from nemotron.data.prepare.options import ChatOptions, HubOptions, PrepareOptions
    from nemotron.errors import UserError

    if reasoning_off_rate + reasoning_budget_rate > 1:
        raise UserError("exceed 1; lower one.", key="--no-reasoning and --cut-reasoning")
    chats = ChatOptions(
        messages_column=messages,
        tools_column=tools,
        enable_thinking=thinking,
        truncate_history_thinking=not all_thinking,
        reasoning_off_rate=reasoning_off_rate,
        reasoning_budget_rate=reasoning_budget_rate,
    )
    changed = chats.model_dump(exclude_defaults=True)
    if changed and not chat:
        raise UserError(
            "goes with --chat; give it, too.", key=OPTIONS_OF_CHATS[next(iter(changed))]
        )
    options = PrepareOptions(
        column=column,
        filters=tuple(filters or ()),
        separator=separator and _unescaped(separator),
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
    special: Annotated[
        list[str] | None,
        typer.Option(help="Special token in addition to those of Nemotron 3; repeatable."),
    ] = None,
    column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    sample_mib: Annotated[
        int, typer.Option(min=1, help="Most MiB of input to learn from, spread over all of it.")
    ] = 1024,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file OUT.")] = False,
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


@app.command("demo", epilog="Example: nemotron data demo grammar --out data/demo")
def data_demo(
    kind: Annotated[
        str,
        typer.Argument(
            help="grammar, a small made-up language; en, English verse; or yue, 112,000 Cantonese "
            "sentences of the package pycantonese, and 1,500 with English words."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder in which text.jsonl is written.")],
    number: Annotated[
        int | None, typer.Option(min=1, help="Sentences; default: all, 5000 of the grammar.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides the sentences of the grammar.")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> int:
    """Write sentences to try text correction on."""
    from nemotron.data.codeswitch.demo import write_demo

    return write_demo(kind, out, number=number, seed=seed, overwrite=overwrite)


@app.command(
    "characters",
    epilog="Example: nemotron data characters data/demo/*.jsonl --out data/demo/tokenizer.json",
)
def data_characters(
    sources: RowSources,
    out: Annotated[Path, typer.Option(help="The tokenizer.json to write.")],
    vocab_size: Annotated[
        int | None, typer.Option(help="Most ids, special tokens included; default: no limit.")
    ] = None,
    special: Annotated[
        list[str] | None,
        typer.Option(help="Special token in addition to those of Nemotron 3; repeatable."),
    ] = None,
    column: Annotated[str, typer.Option(help="Column that holds the text; pairs need none.")] = (
        "text"
    ),
    max_bad_rows: MaxBadRows = 100,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file OUT.")] = False,
) -> int:
    """Make a tokenizer whose tokens are the characters of texts and pairs."""
    from nemotron.data.rewrite.characters import learn_characters

    return learn_characters(
        sources,
        out,
        vocab_size=vocab_size,
        special=special or (),
        column=column,
        max_bad_rows=max_bad_rows,
        overwrite=overwrite,
    )


@app.command(
    "noise",
    epilog="Example: nemotron data noise data/demo/text.jsonl --language grammar --out pairs.jsonl",
)
def data_noise(
    sources: RowSources,
    out: Annotated[Path, typer.Option(help="JSON lines to write, a pair in each.")],
    language: Annotated[
        str, typer.Option(help="Whose sounds are confused: grammar, zh, yue, en or letters.")
    ],
    candidates: Annotated[
        int, typer.Option(min=1, max=16, help="Candidates of each pair, the best one first.")
    ] = 4,
    rate: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the tokens that some candidate has wrong.")
    ] = 0.2,
    seed: Annotated[int, typer.Option(help="Decides the errors.")] = 1,
    sounds: Annotated[
        bool,
        typer.Option("--sounds", help="Write the sounds of the text as the only candidate."),
    ] = False,
    column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    max_bad_rows: MaxBadRows = 100,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file OUT.")] = False,
) -> int:
    """Make pairs for text correction: texts, and candidates with the errors of a recognizer."""
    from nemotron.data.rewrite.noise import add_noise

    return add_noise(
        sources,
        out,
        language=language,
        candidates=candidates,
        rate=rate,
        seed=seed,
        sounds=sounds,
        column=column,
        max_bad_rows=max_bad_rows,
        overwrite=overwrite,
    )


@app.command(
    "pairs",
    epilog="Example: nemotron data pairs pairs.jsonl --tokenizer data/demo --out data/pairs",
)
def data_pairs(
    sources: RowSources,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    form: Annotated[
        str,
        typer.Option(
            "--as", help="rows: aligned, for stage: correct; chat: conversations, for stage: sft."
        ),
    ] = "rows",
    candidates: Annotated[
        int, typer.Option(min=1, max=16, help="Candidates of every pair in the shards.")
    ] = 4,
    language: Annotated[
        str | None,
        typer.Option(
            help="Whose sounds align tokens: grammar, zh, yue, en or letters; default: that of "
            "each pair, else letters."
        ),
    ] = None,
    tokenizer: Annotated[
        str, typer.Option(help="The word embedded, a tokenizer.json, or its folder.")
    ] = "embedded",
    filters: Annotated[
        list[str] | None,
        typer.Option("--filter", help="Keep only rows that pass, such as 'language == yue'."),
    ] = None,
    hold_out: Annotated[
        float,
        typer.Option(
            min=0, max=0.999, help="Share of pairs held out for validation, chosen by their target."
        ),
    ] = 0.01,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of processes; default: one per core.")
    ] = None,
    max_bad_rows: MaxBadRows = 100,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder OUT.")] = False,
) -> int:
    """Turn pairs into token shards; repeat a stopped command to continue it."""
    from nemotron.data.prepare.command import prepare_pairs

    return prepare_pairs(
        sources,
        out,
        form=form,
        candidates=candidates,
        language=language,
        tokenizer=tokenizer,
        filters=filters or (),
        hold_out=hold_out,
        workers=workers,
        max_bad_rows=max_bad_rows,
        overwrite=overwrite,
    )


@app.command(
    "codeswitch",
    epilog="Example: nemotron data codeswitch text.jsonl --lexicon cedict --out cs.jsonl",
)
def data_codeswitch(
    sources: RowSources,
    out: Annotated[Path, typer.Option(help="JSON lines to write, a sentence in each.")],
    mode: Annotated[
        str,
        typer.Option(
            help="insert: replace words by the lexicon; parallel: mix texts with translations."
        ),
    ] = "insert",
    lexicon: Annotated[
        str | None,
        typer.Option(help="Words, tabs and translations in a file, or cedict: CC-CEDICT."),
    ] = None,
    segment: Annotated[
        str, typer.Option(help="How words are found: longest in the lexicon, or jieba.")
    ] = "longest",
    share: Annotated[
        float, typer.Option(min=0.01, max=0.99, help="Share of the words to switch.")
    ] = 0.2,
    per_sentence: Annotated[
        int, typer.Option(min=1, max=1000, help="Most sentences that are made of one.")
    ] = 5,
    spf: Annotated[
        str,
        typer.Option(
            help="Mean and deviation of the share of places that switch, of which sentences like "
            "those are kept; none: any."
        ),
    ] = "0.29,0.21",
    languages: Annotated[
        str, typer.Option(help="Names of both languages, first that of the text.")
    ] = "zh,en",
    column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    translation: Annotated[
        str, typer.Option(help="Column that holds the translation, for parallel.")
    ] = "translation",
    seed: Annotated[int, typer.Option(help="Decides what switches.")] = 1,
    max_bad_rows: MaxBadRows = 100,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file OUT.")] = False,
) -> int:
    """Make text that switches between two languages, and measure how much it does."""
    from nemotron.data.codeswitch.command import codeswitch, read_rule

    return codeswitch(
        sources,
        out,
        rule=read_rule(languages, share, per_sentence, spf),
        mode=mode,
        lexicon=lexicon,
        segment=segment,
        columns=(column, translation),
        seed=seed,
        max_bad_rows=max_bad_rows,
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
    from nemotron.data.inspect_pairs import holds_pairs, inspect_pairs
    from nemotron.posttrain.correct.config import CorrectConfig
    from nemotron.recipe.load import load_recipe
    from nemotron.recipe.shipped import names, path_of

    is_there = any(os.path.exists(f"{target}{end}") for end in ("", ".bin", ".idx"))
    if not is_there and str(target) in names():
        target = path_of(str(target))
    if target.suffix in (".yaml", ".yml") or (target / "recipe.yaml").is_file():
        config = load_recipe(target, overrides or []).config
        if isinstance(config, CorrectConfig):
            from nemotron.posttrain.correct.inspect import inspect_recipe

            _refuse_plots(plots)
            return inspect_recipe(config, step=step, rows=rows, documents=documents, check=check)
        data = _recipe_data(target, overrides)
    elif holds_pairs(target):
        _refuse_plots(plots)
        return inspect_pairs(
            target, tokenizer=tokenizer, rows=rows, documents=documents, check=check
        )
    else:
        with tempfile.TemporaryDirectory() as cache:
            data = open_path(
                target, tokenizer=tokenizer, eod_token=eod_token, seq_len=seq_len, cache=cache
            )
            return inspect(
                data, step=step, rows=rows, documents=documents, check=check, plots=plots
            )
    return inspect(data, step=step, rows=rows, documents=documents, check=check, plots=plots)


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
