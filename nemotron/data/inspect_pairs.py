"""Looking at pairs before a run: how many, how wrong their candidates are, and some as text."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from nemotron.data.correct.marks import Marks, marks_of
from nemotron.data.correct.pairs import PairRow, read_rows
from nemotron.data.folder import TokenSet, open_tokens, read_manifest
from nemotron.data.indexed import Stream
from nemotron.data.inspect import check_all
from nemotron.data.plan import wide_console
from nemotron.data.tokenizer import Tokenizer, load_tokenizer
from nemotron.errors import UserError
from nemotron.exit_codes import DONE
from nemotron.terminal import print_text, printable

LONGEST_SHOWN = 3
"""Duration from which on durations are counted together."""


def holds_pairs(path: Path) -> bool:
    """Say whether a folder is from `nemotron data pairs --as rows`."""
    manifest = read_manifest(path) if path.is_dir() else None
    return manifest is not None and manifest.form == "pairs"


def inspect_pairs(path: Path, *, tokenizer: str, rows: int, documents: int, check: bool) -> int:
    """Print what the pairs of a folder are, from the first `documents`, and some as text.

    Raises:
        UserError: when the tokenizer is not that of the pairs, or `check` finds a damaged file.
    """
    manifest = read_manifest(path)
    assert manifest is not None, "asked before"
    loaded = load_tokenizer(tokenizer)
    tokens = open_tokens(str(path), loaded, manifest.eod_token, loaded.vocab_size)
    print_pairs(path.absolute().name, tokens, loaded, documents=documents)
    if check:
        check_all([tokens.train, tokens.validation], loaded.vocab_size)
        print_text("all files and all ids are correct")
    marks = marks_of(loaded)
    for number, row in enumerate(islice(_pairs(tokens.train), rows)):
        for line in as_text(number, row, loaded, marks):
            print_text(line)
    return DONE


def print_pairs(name: str, tokens: TokenSet, tokenizer: Tokenizer, *, documents: int) -> None:
    """Print number, lengths, and the share of wrong tokens of each candidate.

    Raises:
        UserError: when the folder holds no pairs.
    """
    marks, console = marks_of(tokenizer), wide_console()
    found = list(islice(_pairs(tokens.train), documents))
    if not found:
        raise UserError("has no pairs to train on.", where=str(tokens.path))
    console.print(
        f"{name}: {tokens.train.num_documents:,} pairs of {found[0].num_candidates} candidates to "
        f"train on, {tokens.validation.num_documents:,} held out"
    )
    for what, lengths in (
        ("columns", [row.num_columns for row in found]),
        ("target", [len(row.target) for row in found]),
    ):
        parts = np.percentile(lengths, [5, 50, 95, 100]).astype(int).tolist()
        console.print(f"{what}: p5 {parts[0]}, p50 {parts[1]}, p95 {parts[2]}, longest {parts[3]}")
    for candidate in range(found[0].num_candidates):
        console.print(_candidate(found, candidate, marks))


def as_text(number: int, row: PairRow, tokenizer: Tokenizer, marks: Marks) -> Iterator[str]:
    """Yield the aligned candidates of a pair, a hole as `_`, and its target."""
    yield f"pair {number}"
    for tokens, kept in zip(row.columns, row.is_kept, strict=True):
        shown = ["_" if t == marks.void else tokenizer.decode([t]) for t in tokens.tolist()]
        wrong = int((~kept & (tokens != marks.void)).sum())
        yield f"  {printable(''.join(shown))}  ({wrong} wrong)"
    yield f"  {printable(tokenizer.decode(row.target.tolist()))}  (target)"


def _candidate(found: list[PairRow], candidate: int, marks: Marks) -> str:
    tokens = np.concatenate([row.columns[candidate] for row in found]) != marks.void
    wrong = np.concatenate([~row.is_kept[candidate] for row in found])[tokens]
    durations = np.concatenate([row.durations[candidate] for row in found])[tokens]
    counts = np.bincount(durations.clip(max=LONGEST_SHOWN), minlength=LONGEST_SHOWN + 1)
    shares = (counts / max(1, len(durations))).tolist()
    spread = ", ".join(
        f"{length}{'+' if length == LONGEST_SHOWN else ''}: {share:.1%}"
        for length, share in enumerate(shares)
    )
    return (
        f"candidate {candidate + 1}: {wrong.mean() if len(wrong) else 0:.1%} of the tokens wrong, "
        f"{1 - tokens.mean():.1%} of the columns holes, durations {spread}"
    )


def _pairs(stream: Stream) -> Iterator[PairRow]:
    for shard in stream.shards:
        yield from read_rows(shard)
