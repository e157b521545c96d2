"""The command `nemotron data tokenizer`: a tokenizer that is trained on a user's text."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemotron.data.bpe import NUM_BYTES, SPECIALS, train_bpe
from nemotron.data.prepare.inputs import Plan, plan
from nemotron.data.prepare.options import PrepareOptions
from nemotron.data.prepare.progress import PrepareProgress
from nemotron.data.prepare.read import Bad, Tick
from nemotron.data.prepare.unit import Tally, read_chunks
from nemotron.data.tokenizer import MOST_TOKENS, Tokenizer
from nemotron.errors import UserError
from nemotron.exit_codes import DONE
from nemotron.files import read_regular, write_text
from nemotron.outputs import unwritable
from nemotron.terminal import print_text

ROWS_OF_A_MATRIX = 128
"""Of which the vocabulary of a model is best a multiple, for its matrix products."""


def learn_tokenizer(
    sources: Sequence[str],
    out: Path,
    *,
    vocab_size: int,
    specials: Sequence[str],
    column: str,
    sample_bytes: int,
    overwrite: bool,
) -> int:
    """Train a tokenizer on the sources, write its `tokenizer.json`, and say how to use it.

    Raises:
        UserError: when the sources hold no text, the size is impossible, or the file exists.
    """
    least = len(SPECIALS) + len(specials) + NUM_BYTES
    if not least <= vocab_size <= MOST_TOKENS:
        raise UserError(
            f"must be from {least} ({NUM_BYTES} bytes and the special tokens) to {MOST_TOKENS}.",
            key="--vocab-size",
            value=vocab_size,
        )
    check_target(out, overwrite=overwrite)
    options = PrepareOptions(column=column)
    made = plan(sources, options, (out,))
    for sentence in made.passed_over:
        print_text(sentence, sys.stderr)
    tally = Tally(lambda text: None)
    with PrepareProgress(min(sample_bytes, sum(unit.size for unit in made.units)), 0) as progress:
        texts = _texts(made, options, sample_bytes, progress.advance, tally)
        content = train_bpe(texts, vocab_size, specials)
    if not tally.counts["text_bytes"]:
        why = f"; the first bad row: {tally.bad_rows[0]}" if tally.bad_rows else ""
        raise UserError(f"there is no text to learn from{why}.", where=", ".join(sources))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, content)
    except OSError as error:
        raise unwritable(error, out, "nothing was replaced") from None
    for line in _describe(Tokenizer(content.encode()), out, vocab_size, tally):
        print_text(line)
    return DONE


def check_target(out: Path, *, overwrite: bool) -> None:
    """Check that a tokenizer may be written.

    Raises:
        UserError: when the file is a folder, or is there and may not be replaced.
    """
    if out.is_dir():
        raise UserError(
            f"is a folder; give the file, such as {out / 'tokenizer.json'}.", where=str(out)
        )
    if not out.exists():
        return
    if not overwrite:
        raise UserError("exists already; add --overwrite to replace it.", where=str(out))
    try:
        Tokenizer(read_regular(out))
    except (ValueError, KeyError, OSError):
        raise UserError(
            "is not a tokenizer.json, so it is not replaced; choose another file.", where=str(out)
        ) from None


def _texts(
    made: Plan, options: PrepareOptions, most: int, tick: Tick, tally: Tally
) -> Iterator[str]:
    """Yield text of about `most` bytes of the input: of every unit, or of evenly spread ones."""
    every = max(1, -(-sum(unit.size for unit in made.units) // most))
    left = most
    for unit in made.units[::every]:
        for piece in unit.pieces:
            for chunk in read_chunks(piece, options, tick, tally):
                if isinstance(chunk, Bad):
                    tally.bad(chunk)
                    continue
                size = len(chunk.text.encode())
                tally.counts["text_bytes"] += size
                yield chunk.text
                left -= size
                if left <= 0:
                    return


def _describe(tokenizer: Tokenizer, out: Path, asked: int, tally: Tally) -> Iterator[str]:
    """Yield what was made, and the settings with which a run uses it."""
    size = tokenizer.vocab_size
    yield f"{out}: {size:,} tokens, from {tally.counts['text_bytes'] / 1e6:,.1f} MB of text"
    if size < asked:
        yield f"the text gives no more tokens; {asked:,} were asked for"
    if tally.counts["bad"]:
        yield f"left out: {tally.counts['bad']:,} unreadable, such as {tally.bad_rows[0]}"
    yield f"use it as: data.tokenizer={out} model.vocab_size={rows_of_model(size)}"


def rows_of_model(vocab_size: int) -> int:
    """Return the size of a model's vocabulary that holds so many ids and multiplies well."""
    return -(-vocab_size // ROWS_OF_A_MATRIX) * ROWS_OF_A_MATRIX
