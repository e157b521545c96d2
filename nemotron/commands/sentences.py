"""Commands that make sentences and pairs for text correction, in the group `data`."""

from pathlib import Path
from typing import Annotated

import typer

from nemotron.commands.shared import CommandGroup, ReplaceFile, ReplaceFolder
from nemotron.commands.sources import (
    MaxBadRows,
    RowSources,
    SpecialTokens,
    TextColumn,
    Tokenizer,
    Workers,
)

app = CommandGroup()


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
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file text.jsonl.")
    ] = False,
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
    special: SpecialTokens = None,
    column: Annotated[str, typer.Option(help="Column that holds the text; pairs need none.")] = (
        "text"
    ),
    max_bad_rows: MaxBadRows = 100,
    overwrite: ReplaceFile = False,
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
    column: TextColumn = "text",
    max_bad_rows: MaxBadRows = 100,
    overwrite: ReplaceFile = False,
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
    tokenizer: Tokenizer = "embedded",
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
    workers: Workers = None,
    max_bad_rows: MaxBadRows = 100,
    overwrite: ReplaceFolder = False,
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
    column: TextColumn = "text",
    translation: Annotated[
        str, typer.Option(help="Column that holds the translation, for parallel.")
    ] = "translation",
    seed: Annotated[int, typer.Option(help="Decides what switches.")] = 1,
    max_bad_rows: MaxBadRows = 100,
    overwrite: ReplaceFile = False,
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
