"""Correcting a file of candidates, a line at a time: what is read, and what is written."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nemotron.data.correct.align import columns_of
from nemotron.data.correct.sound import sound_of
from nemotron.data.tokenizer import Tokenizer
from nemotron.errors import UserError
from nemotron.files import parse_json, write_text
from nemotron.posttrain.correct.run import Corrector, Source

AT_ONCE = 256
"""Lines that are corrected together."""
LETTERS = "letters"
"""Language whose tokens sound as they are written."""


@dataclass(frozen=True)
class Line:
    """A line that can be corrected."""

    number: int
    candidates: list[str]
    scores: list[list[float]] | None
    fields: dict[str, Any]  # Any: JSON
    """All that the line holds."""


@dataclass
class Told:
    """What is said at the end."""

    lines: int = 0
    bad: list[str] = field(default_factory=list)
    """Lines that cannot be read, and why."""
    repeated: int = 0
    """Lines with fewer candidates than the model reads."""
    replaced: int = 0
    """Answers that were empty or too long, in place of which the first candidate stays."""
    seconds: float = 0.0

    def sentences(self) -> Iterator[str]:
        """Yield what was done, and what was not as it should be."""
        each = 1000 * self.seconds / max(1, self.lines)
        yield f"{self.lines:,} lines corrected, {each:.1f} ms each"
        if self.repeated:
            yield f"{self.repeated:,} had too few candidates: the first was repeated"
        if self.replaced:
            yield f"{self.replaced:,} answers were empty or too long: the first candidate stays"
        for reason in self.bad:
            yield f"left out: {reason}"


class Corrects(Protocol):
    """What turns lines into answers."""

    def __call__(self, lines: Sequence[Line], told: Told) -> list[str]:
        """Return the corrected text of each line."""
        ...


def correct_file(
    source: Path, out: Path, corrects: Corrects, *, max_bad_rows: int = 0, overwrite: bool = False
) -> Told:
    """Write each line of a file with its `answer`; nothing is written before all are answered.

    Raises:
        UserError: when a file is unfit, or more than `max_bad_rows` lines cannot be read.
    """
    if not out.parent.is_dir():
        raise UserError("is in a folder that does not exist.", key="--out", value=out)
    if out.exists() and not overwrite:
        raise UserError(
            "exists already; name another file, or add --overwrite.", key="--out", value=out
        )
    told = Told()
    lines = list(_read(source, told, max_bad_rows))
    start, written = time.perf_counter(), list[str]()
    for first in range(0, len(lines), AT_ONCE):
        some = lines[first : first + AT_ONCE]
        for line, answer in zip(some, corrects(some, told), strict=True):
            written.append(json.dumps({**line.fields, "answer": answer}, ensure_ascii=False))
    told.lines, told.seconds = len(lines), time.perf_counter() - start
    write_text(out, "".join(f"{text}\n" for text in written))
    return told


def _read(path: Path, told: Told, max_bad_rows: int) -> Iterator[Line]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError("is not UTF-8 text; give it in that encoding.", where=str(path)) from None
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(
            f"cannot be read: {error.strerror}; give a file of JSON lines.",
            key="--in",
            value=path,
        ) from None
    for number, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            yield _parse(number, content)
        except ValueError as error:
            told.bad.append(f"{path}, line {number}: {error}")
            if len(told.bad) > max_bad_rows:
                raise UserError(
                    f"{told.bad[-1]}; correct it, or allow such lines with --max-bad-rows."
                ) from None


def _parse(number: int, content: str) -> Line:
    """Return a line; raises ValueError with the reason if it cannot be read."""
    row = parse_json(content)
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")
    candidates = row.get("candidates")
    if not isinstance(candidates, list) or not candidates:
        raise ValueError("has no candidates")
    if not all(isinstance(candidate, str) for candidate in candidates):
        raise ValueError("has a candidate that is no text")
    if not any(candidates):
        raise ValueError("has no candidate with text")
    scores = row.get("scores")
    if scores is not None and (
        not isinstance(scores, list)
        or len(scores) != len(candidates)
        or not all(isinstance(own, list) and all(map(_is_number, own)) for own in scores)
    ):
        raise ValueError("has scores that are not a list of numbers for each candidate")
    return Line(number, candidates, scores, row)


def _is_number(value: Any) -> bool:  # Any: JSON
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class InParallel:
    """Corrects lines by a model of the stage correct."""

    corrector: Corrector
    tokenizer: Tokenizer
    language: str = LETTERS
    """Of lines that name none: how tokens sound, by which candidates are aligned."""

    def __call__(self, lines: Sequence[Line], told: Told) -> list[str]:
        """Return the corrected text of each line.

        Raises:
            UserError: when a line has scores for another number of tokens, or its language is
                unknown.
        """
        sources = [self._source(line, told) for line in lines]
        answers = self.corrector.correct(sources)
        return [self.tokenizer.decode(answer.tokens) for answer in answers]

    def _source(self, line: Line, told: Told) -> Source:
        wanted = self.corrector.model.config.num_candidates
        missing = max(0, wanted - len(line.candidates))
        told.repeated += missing > 0
        texts = [*line.candidates, *[line.candidates[0]] * missing][:wanted]
        ids = self.tokenizer.encode_batch(texts)
        columns = columns_of(ids, self._sound(line)).lines
        void = self.corrector.specials.marks.void
        filled = np.array([[void if t is None else t for t in own] for own in columns], np.int64)
        if line.scores is None:
            return Source(filled)
        scores = [*line.scores, *[line.scores[0]] * missing][:wanted]
        for own, tokens in zip(scores, ids, strict=True):
            if len(own) != len(tokens):
                raise UserError(
                    f"line {line.number} has {len(own)} scores for {len(tokens)} tokens; give one "
                    "for each token of a candidate."
                )
        placed = np.zeros(filled.shape)
        for place, own, values in zip(placed, filled, scores, strict=True):
            place[own != void] = values
        return Source(filled, placed)

    def _sound(self, line: Line) -> Callable[[int], str]:
        sound = sound_of(str(line.fields.get("language", self.language)))
        return lambda token: sound(self.tokenizer.decode([token]))
