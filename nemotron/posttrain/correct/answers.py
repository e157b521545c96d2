"""Correcting a file of candidates, a line at a time: what is read, and what is written."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nemotron.data.correct.pair import Pair, pair_of
from nemotron.data.rewrite.rows import check_file, new_lines
from nemotron.errors import UserError
from nemotron.files import parse_json, read_text_file

AT_ONCE = 256
"""Lines that are corrected together."""
WARM_UP = 20
"""Lines that are corrected once before any is timed."""


@dataclass(frozen=True)
class Line:
    """A line that can be corrected."""

    where: str
    pair: Pair
    fields: dict[str, Any]  # Any: JSON
    """All that the line holds."""


@dataclass(frozen=True)
class Corrected:
    """The text of an answer, and of what was selected among the candidates before."""

    answer: str
    selected: str | None = None
    judged: tuple[tuple[str, float], ...] = ()
    """Tokens of the choice with their log-probabilities, where the model judges them."""


@dataclass
class Counts:
    """What is said at the end."""

    lines: int = 0
    bad: list[str] = field(default_factory=list)
    """Lines that cannot be read, and why."""
    repeated: int = 0
    """Lines with fewer candidates than the model reads."""
    cut: int = 0
    """Lines with more."""
    replaced: int = 0
    """Answers that were empty or too long, in place of which the first candidate stays."""

    def sentences(self) -> Iterator[str]:
        """Yield what was done, and what was not as it should be."""
        yield f"{self.lines:,} lines corrected"
        if self.repeated:
            yield f"{self.repeated:,} had too few candidates: the first was repeated"
        if self.cut:
            yield f"{self.cut:,} had too many candidates: the last were left out"
        if self.replaced:
            yield f"{self.replaced:,} answers were empty or too long: the first candidate stays"
        for reason in self.bad:
            yield f"left out: {reason}"


class Corrects(Protocol):
    """What turns lines into answers."""

    def __call__(self, lines: Sequence[Line], counts: Counts) -> list[Corrected]:
        """Return the corrected text of each line."""
        ...


@dataclass(frozen=True)
class Files:
    """What is read and written."""

    source: Path
    out: Path
    max_bad_rows: int = 0
    overwrite: bool = False
    timed: bool = False
    """Whether each line is corrected by itself, and its time written."""
    judged: bool = False
    """Whether the log-probability of each chosen token is written."""


def correct_file(files: Files, corrects: Corrects) -> Counts:
    """Write each line of a file with its `answer`; nothing is written before all are answered.

    Raises:
        UserError: when a file is unfit, or more than `max_bad_rows` lines cannot be read.
    """
    out = files.out
    if not out.parent.is_dir():
        raise UserError("is in a folder that does not exist.", key="--out", value=out)
    check_file(out, [str(files.source)], overwrite=files.overwrite)
    counts = Counts()
    lines = list(_read(files, counts))
    with new_lines(out) as file:
        file.writelines(f"{text}\n" for text in _answered(lines, corrects, counts, files))
    return counts


def _answered(
    lines: Sequence[Line], corrects: Corrects, counts: Counts, files: Files
) -> Iterator[str]:
    at_once = 1 if files.timed else AT_ONCE
    for line in lines[: WARM_UP if files.timed else 0]:
        corrects([line], Counts())
    for first in range(0, len(lines), at_once):
        some, start = lines[first : first + at_once], time.perf_counter()
        found = corrects(some, counts)
        elapsed = {"ms": 1000 * (time.perf_counter() - start)} if files.timed else {}
        for line, corrected in zip(some, found, strict=True):
            own: dict[str, Any] = {"answer": corrected.answer}  # Any: JSON
            if corrected.selected is not None:
                own["selected"] = corrected.selected
            if files.judged and corrected.judged:
                own["judged"] = [[token, round(score, 4)] for token, score in corrected.judged]
            yield json.dumps({**line.fields, **own, **elapsed}, ensure_ascii=False)
        counts.lines += len(some)


def _read(files: Files, counts: Counts) -> Iterator[Line]:
    path = files.source
    for number, content in enumerate(read_text_file(path).split("\n"), 1):
        if not content.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = parse_json(content)
            if not isinstance(row, dict):
                raise ValueError("is not a JSON object")
            yield Line(where, pair_of(row, targets=False), row)
        except ValueError as error:
            counts.bad.append(f"{where} {error}")
            if len(counts.bad) > files.max_bad_rows:
                rule = f"{counts.bad[-1]}; correct it, or allow such lines with --max-bad-rows."
                raise UserError(rule) from None
