"""The command `nemotron data demo`: sentences to try text correction and code-switching on."""

import json
import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from nemotron.data.codeswitch.real import HKCANCOR, has_latin, real_sentences
from nemotron.data.corpus import load_documents
from nemotron.data.correct.grammar import sentences
from nemotron.data.correct.mixed import is_character
from nemotron.data.correct.sound import require
from nemotron.data.rewrite.rows import check_file, new_lines
from nemotron.errors import UserError
from nemotron.exit_codes import DONE
from nemotron.terminal import print_text

LEAST, MOST = 2, 60
"""Characters of a sentence of the corpora."""
Texts = Iterator[dict[str, Any]]  # Any: what JSON holds


def write_demo(kind: str, out: Path, *, number: int | None, seed: int, overwrite: bool) -> int:
    """Write `OUT/text.jsonl`, of Cantonese also `OUT/mixed.jsonl`, and say what comes next.

    Raises:
        UserError: when the kind is unknown, its package is missing, or a file exists.
    """
    if kind not in KINDS:
        raise UserError(f"is unknown; use {', '.join(KINDS)}.", key="KIND", value=kind)
    texts = {out / f"{name}.jsonl": make(seed) for name, make in KINDS[kind].items()}
    for file in texts:
        check_file(file, (), overwrite=overwrite)
    most = GRAMMAR if number is None and kind == "grammar" else number
    for file, rows in texts.items():
        written = 0
        with new_lines(file) as lines:
            for row in islice(rows, most):
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
                written += 1
        print_text(f"{file}: {written:,} sentences")
    text = out / "text.jsonl"
    print_text(f"next: nemotron data noise {text} --language {kind} --out {out / 'pairs.jsonl'}")
    return DONE


def _grammar(seed: int) -> Texts:
    for index, words in enumerate(sentences(seed)):
        yield {"id": f"grammar-{index}", "text": "".join(words), "language": "grammar"}


def _english(seed: int) -> Texts:
    """Yield lines of the verse of the package."""
    lines = (line.strip() for text in load_documents("verse") for line in text.split("\n"))
    usable = (line for line in lines if LEAST <= len(line) <= MOST)
    for index, line in enumerate(usable):
        yield {"id": f"en-{index}", "text": line, "language": "en"}


def _cantonese(seed: int) -> Texts:
    """Yield sentences of CTCPC, a Cantonese corpus under CC0 that comes with pycantonese.

    Sentences with Latin letters are left out, so that nothing switches; the others come in random
    order, because the corpus has them in that of their characters.
    """
    require("pycantonese", "yue")
    from pycantonese.data.ctcpc import SENTS

    shuffled = random.Random(seed).sample(SENTS, len(SENTS))
    usable = (text.strip() for text in shuffled if not has_latin(text))
    texts = (text for text in usable if LEAST <= len(text) <= MOST and any(map(is_character, text)))
    for index, text in enumerate(texts):
        yield {"id": f"yue-{index}", "text": text, "language": "yue"}


def _switching(seed: int) -> Texts:
    """Yield what speakers of Cantonese said with English words in it."""
    require("pycantonese", "yue")
    for index, real in enumerate(real_sentences()):
        if LEAST <= len(real.text) <= MOST:
            yield {
                "id": f"{HKCANCOR}-{index}",
                "text": real.text,
                "words": real.words,
                "languages": real.languages,
                "cmi": round(real.measures.cmi, 4),
                "i_index": round(real.measures.i_index, 4),
            }


GRAMMAR = 5000
"""Sentences of the grammar, which has no end."""
KINDS: dict[str, dict[str, Callable[[int], Texts]]] = {
    "grammar": {"text": _grammar},
    "en": {"text": _english},
    "yue": {"text": _cantonese, "mixed": _switching},
}
"""The files of each kind."""
