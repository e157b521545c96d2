"""The command `nemotron data prepare` and its output."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from nemotron.data.correct.pair import FORMS, PairOptions
from nemotron.data.folder import Manifest
from nemotron.data.prepare.inputs import plan
from nemotron.data.prepare.options import PrepareOptions
from nemotron.data.prepare.pairs import PairEncoder
from nemotron.data.prepare.run import prepare as run
from nemotron.data.tokenizer import load_tokenizer
from nemotron.errors import UserError
from nemotron.exit_codes import DONE
from nemotron.terminal import print_text


def prepare(
    sources: Sequence[str],
    out: Path,
    *,
    tokenizer: str,
    options: PrepareOptions,
    workers: int | None,
    max_bad_rows: int,
    overwrite: bool,
    dry_run: bool,
) -> int:
    """Prepare data and print a summary.

    Raises:
        UserError: as `nemotron.data.prepare.run.prepare` does.
    """
    if dry_run:
        load_tokenizer(tokenizer, "--tokenizer").id(options.eod_token)
        made = plan(sources, options, (out,))
        size = sum(unit.size for unit in made.units)
        print_text(
            f"{len(made.inputs):,} inputs, {size / 1e6:,.1f} MB, would become up to "
            f"{len(made.units):,} shards in {out}"
        )
        for sentence in made.passed_over:
            print_text(sentence, sys.stderr)
        return DONE
    manifest = run(
        sources,
        out,
        tokenizer=tokenizer,
        options=options,
        workers=workers or len(os.sched_getaffinity(0)),
        max_bad_rows=max_bad_rows,
        overwrite=overwrite,
    )
    for line in describe(manifest, out):
        print_text(line)
    for line in manifest.bad_rows:
        print_text(f"left out: {line}", sys.stderr)
    return DONE


def prepare_pairs(
    sources: Sequence[str],
    out: Path,
    *,
    form: str,
    candidates: int,
    language: str | None,
    tokenizer: str,
    filters: Sequence[str],
    hold_out: float,
    workers: int | None,
    max_bad_rows: int,
    overwrite: bool,
) -> int:
    """Prepare pairs for text correction and print a summary.

    Raises:
        UserError: when an option is wrong, and as `nemotron.data.prepare.run.prepare` does.
    """
    if form not in FORMS:
        raise UserError(f"is unknown; use {' or '.join(FORMS)}.", key="--as", value=form)
    pairs = PairOptions(form=form, candidates=candidates, language=language)
    PairEncoder(load_tokenizer(tokenizer, "--tokenizer"), pairs)  # before any work
    options = PrepareOptions(filters=tuple(filters), validation_fraction=hold_out, pairs=pairs)
    return prepare(
        sources,
        out,
        tokenizer=tokenizer,
        options=options,
        workers=workers,
        max_bad_rows=max_bad_rows,
        overwrite=overwrite,
        dry_run=False,
    )


def describe(manifest: Manifest, out: Path) -> list[str]:
    """Return lines that describe a prepared folder."""
    counts = manifest.counts
    documents = "pairs" if "pairs" in manifest.options else "documents"
    lines = [
        f"{out}: {counts.documents:,} {documents} with {counts.tokens:,} tokens to train on, "
        f"{counts.held_out_documents:,} with {counts.held_out_tokens:,} held out, from "
        f"{counts.rows:,} rows and {counts.text_bytes / 1e6:,.1f} MB of text"
    ]
    left_out = {
        "empty": counts.empty,
        "filtered out": counts.filtered,
        "unreadable": counts.bad,
        "without a supervised token": counts.unsupervised,
    }
    if any(left_out.values()):
        listed = ", ".join(f"{number:,} {what}" for what, number in left_out.items() if number)
        lines.append(f"left out: {listed}")
    if counts.repeated:
        lines.append(
            f"too few candidates: {counts.repeated:,} pairs, in which the first one is repeated"
        )
    if counts.cut:
        lines.append(f"more candidates: {counts.cut:,} pairs, of which only the first are kept")
    if manifest.validation_fraction and not counts.held_out_documents:
        lines.append(
            f"no document is held out: --hold-out {manifest.validation_fraction:g} selected none "
            f"of {counts.documents:,}; a run needs a larger share, or a set in data.validation"
        )
    lines.append(f"use it as: sources: [{{name: {out.name}, path: {out}}}]")
    return lines
