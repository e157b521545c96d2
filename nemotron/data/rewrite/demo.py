"""The command `nemotron data demo`: sentences to try text correction and code-switching on."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from nemotron.data.correct.grammar import sentences
from nemotron.data.correct.mixed import is_character
from nemotron.data.correct.sound import require
from nemotron.data.rewrite.rows import check_file, new_lines
from nemotron.errors import UserError
from nemotron.exit_codes import DONE
from nemotron.terminal import print_text

KINDS = ("grammar", "yue")
LEAST, MOST = 2, 60
"""Characters of a sentence of the corpus."""


def write_demo(kind: str, out: Path, *, number: int | None, seed: int, overwrite: bool) -> int:
    """Write `OUT/text.jsonl`, and say what comes next.

    Raises:
        UserError: when the kind is unknown, its package is missing, or the file exists.
    """
    if kind not in KINDS:
        raise UserError(f"is unknown; use {' or '.join(KINDS)}.", key="KIND", value=kind)
    file = out / "text.jsonl"
    check_file(file, (), overwrite=overwrite)
    texts = (
        _grammar(seed, 5000 if number is None else number) if kind == "grammar" else _yue(number)
    )
    written = 0
    with new_lines(file) as lines:
        for row in texts:
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += 1
    print_text(f"{file}: {written:,} sentences")
    print_text(f"next: nemotron data noise {file} --language {kind} --out {out / 'pairs.jsonl'}")
    return DONE


def _grammar(seed: int, number: int) -> Iterator[dict[str, Any]]:  # Any: what JSON holds
    for index, words in enumerate(islice(sentences(seed), number)):
        yield {"id": f"grammar-{index}", "text": "".join(words), "language": "grammar"}


def _yue(number: int | None) -> Iterator[dict[str, Any]]:  # Any: what JSON holds
    """Yield sentences of CTCPC, a Cantonese corpus under CC0 that comes with pycantonese."""
    require("pycantonese", "yue")
    from pycantonese.data.ctcpc import SENTS

    usable = (text.strip() for text in SENTS)
    texts = (text for text in usable if LEAST <= len(text) <= MOST and any(map(is_character, text)))
    for index, text in enumerate(islice(texts, number)):
        yield {"id": f"yue-{index}", "text": text, "language": "yue"}
