"""The command `nemotron data characters`: a tokenizer of the characters of texts and pairs."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemotron.data.correct.characters import (
    CHARACTER_SPECIALS,
    character_tokenizer,
    count_characters,
)
from nemotron.data.correct.pair import pair_of
from nemotron.data.prepare.learn_tokens import check_target, rows_of_model
from nemotron.data.rewrite.rows import Row, Rows, print_bad, text_of
from nemotron.data.tokenizer import MOST_TOKENS, Tokenizer
from nemotron.errors import UserError
from nemotron.exit_codes import DONE
from nemotron.files import write_text
from nemotron.outputs import unwritable
from nemotron.terminal import print_text


def learn_characters(
    sources: Sequence[str],
    out: Path,
    *,
    vocab_size: int | None,
    special: Sequence[str],
    column: str,
    max_bad_rows: int,
    overwrite: bool,
) -> int:
    """Write the `tokenizer.json` of the characters of the sources, and say how to use it.

    Raises:
        UserError: when the sources hold no text, the size is impossible, or the file exists.
    """
    least = len(CHARACTER_SPECIALS) + len(special) + 1
    if vocab_size is not None and not least <= vocab_size <= MOST_TOKENS:
        raise UserError(
            f"must be from {least} (the special tokens and a character) to {MOST_TOKENS}.",
            key="--vocab-size",
            value=vocab_size,
        )
    check_target(out, overwrite=overwrite)
    rows = Rows(sources, (column, "target", "candidates"), max_bad_rows)
    counts: Counter[str] = Counter()
    for place, row in rows:
        try:
            counts.update(count_characters(_texts(row, column)))
        except ValueError as error:
            rows.refuse(place(), str(error))
    if not counts:
        why = f"; the first bad row: {rows.bad[0]}" if rows.bad else ""
        raise UserError(f"there is no text to learn from{why}.", where=", ".join(sources))
    content = character_tokenizer(counts, vocab_size, special)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, content)
    except OSError as error:
        raise unwritable(error, out, "nothing was replaced") from None
    size = Tokenizer(content.encode()).vocab_size
    known = size - len(CHARACTER_SPECIALS) - len(special)
    print_text(f"{out}: {known:,} of {len(counts):,} characters, {size:,} ids")
    print_bad(rows)
    print_text(f"use it as: data.tokenizer={out} model.vocab_size={rows_of_model(size)}")
    return DONE


def _texts(row: Row, column: str) -> Iterator[str]:
    """Yield the text of a row, or all texts of a pair."""
    if "candidates" in row and column not in row:
        pair = pair_of(row, targets=False)
        yield from pair.candidates
        yield pair.target or ""
    else:
        yield text_of(row, column)
