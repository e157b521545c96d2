"""The command `nemotron data codeswitch`: text that switches between two languages."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nemotron.data.codeswitch.links import Translations
from nemotron.data.codeswitch.switch import Rule, Segment, Switched, equivalents, insertions
from nemotron.data.codeswitch.words import Lexicon, Words, jieba_words, load_lexicon
from nemotron.data.correct.mixed import split_mixed
from nemotron.data.rewrite.rows import Row, Rows, check_file, print_bad, rewrite, text_of
from nemotron.errors import UserError
from nemotron.exit_codes import DONE
from nemotron.terminal import print_text

MODES = ("insert", "parallel")
SEGMENTS = ("longest", "jieba")
MOST_WORDS = 1_000
"""Of a text in the mode parallel: words are aligned in time by the product of two lengths."""
NEAR = 0.75
"""Part of the wanted share below which the command says that it was not reached."""


@dataclass
class _Tally:
    """What was made."""

    unswitched: int = 0
    shares: list[float] = field(default_factory=list)
    cmi: list[float] = field(default_factory=list)
    i_index: list[float] = field(default_factory=list)


def codeswitch(
    sources: Sequence[str],
    out: Path,
    *,
    rule: Rule,
    mode: str,
    lexicon: str | None,
    segment: str,
    columns: tuple[str, str],
    seed: int,
    max_bad_rows: int,
    overwrite: bool,
) -> int:
    """Write sentences that switch, and print how much they do.

    `columns` are those of the text and, in the mode parallel, of its translation.

    Raises:
        UserError: when an option, a source or the lexicon is not fit.
    """
    _check(mode, segment, lexicon)
    check_file(out, sources, overwrite=overwrite)
    known = None if lexicon is None else load_lexicon(lexicon)
    words = _words(known, segment)
    rows = Rows(sources, (*columns, "id"), max_bad_rows)
    if mode == "insert":
        assert known is not None
        segments = _of_lexicon(columns[0], words, known)
    else:
        segments = _of_translations(rows, columns, words)
    tally = _Tally()

    def make(number: int, row: Row) -> Iterator[Row]:
        text, found = segments(row)
        drawn = rule.switched(words(text), found, random.Random(f"codeswitch {seed} {number}"))
        tally.unswitched += not drawn
        for switched in drawn:
            yield _row(row, number, text, switched, tally)

    done = rewrite(rows, out, make, overwrite=overwrite)
    print_text(f"{out}: {done.written:,} sentences from {done.read:,} rows")
    for line in _describe(tally, rule.share):
        print_text(line)
    print_bad(rows)
    return DONE


def read_rule(languages: str, share: float, number: int, spf: str) -> Rule:
    """Return the rule that options describe.

    Raises:
        UserError: when one cannot be read.
    """
    names = tuple(name.strip() for name in languages.split(","))
    if len(names) != 2 or not all(names) or names[0] == names[1]:
        raise UserError(
            "is not two names with a comma; write for example zh,en.",
            key="--languages",
            value=languages,
        )
    try:
        values = None if spf == "none" else tuple(map(float, spf.split(",")))
        fits = values is None or (len(values) == 2 and 0 <= values[0] <= 1 and values[1] > 0)
    except ValueError:
        fits = False
    if not fits:
        rule = "is not a mean and a deviation above 0; write for example 0.29,0.21, or none."
        raise UserError(rule, key="--spf", value=spf)
    likeness = None if values is None else (values[0], values[1])
    return Rule((names[0], names[1]), share, number, likeness)


def _check(mode: str, segment: str, lexicon: str | None) -> None:
    for key, value, known in (("--mode", mode, MODES), ("--segment", segment, SEGMENTS)):
        if value not in known:
            raise UserError(f"is unknown; use {' or '.join(known)}.", key=key, value=value)
    if mode == "insert" and lexicon is None:
        rule = "needs --lexicon; give a file, or cedict."
        raise UserError(rule, key="--mode", value="insert")


def _words(lexicon: Lexicon | None, segment: str) -> Words:
    if segment == "jieba":
        return jieba_words()
    return split_mixed if lexicon is None else lexicon.segment


Segments = Callable[[Row], tuple[str, list[Segment]]]
"""Returns the text of a row, and what may switch in it."""


def _of_lexicon(column: str, words: Words, lexicon: Lexicon) -> Segments:
    def segments(row: Row) -> tuple[str, list[Segment]]:
        text = text_of(row, column)
        return text, list(insertions(words(text), lexicon))

    return segments


def _of_translations(rows: Rows, columns: tuple[str, str], words: Words) -> Segments:
    """Learn translations from all rows first."""
    known: list[tuple[list[str], list[str]]] = []
    for _, row in rows:
        texts = [row.get(column) for column in columns]
        if all(isinstance(text, str) and text.strip() for text in texts):
            pair = words(str(texts[0])), words(str(texts[1]))
            if max(map(len, pair)) <= MOST_WORDS:
                known.append(pair)
    translations = Translations(known)

    def segments(row: Row) -> tuple[str, list[Segment]]:
        text, other = (text_of(row, column) for column in columns)
        source, target = words(text), words(other)
        if (longest := max(len(source), len(target))) > MOST_WORDS:
            raise ValueError(f"has {longest:,} words; at most {MOST_WORDS:,} are aligned")
        return text, list(equivalents(source, target, translations.links(source, target)))

    return segments


def _row(row: Row, number: int, text: str, switched: Switched, tally: _Tally) -> Row:
    measures = switched.measures
    tally.shares.append(switched.share)
    tally.cmi.append(measures.cmi)
    tally.i_index.append(measures.i_index)
    return {
        "id": str(row.get("id", number)),
        "text": switched.text,
        "words": switched.words,
        "languages": switched.languages,
        "cmi": round(measures.cmi, 4),
        "i_index": round(measures.i_index, 4),
        "source": text,
    }


def _describe(tally: _Tally, wanted: float) -> Iterator[str]:
    number = len(tally.cmi)
    yield f"mean CMI {sum(tally.cmi) / number:.1f}, mean I {sum(tally.i_index) / number:.3f}"
    if tally.unswitched:
        yield f"without a place to switch: {tally.unswitched:,} rows"
    if (reached := sum(tally.shares) / number) < NEAR * wanted:
        yield f"--share {wanted:g} was not reached: {reached:.2f} of the words switch"
