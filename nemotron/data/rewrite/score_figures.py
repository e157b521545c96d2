"""Figures of corrected text: what candidates could give, detection, and time over length."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from nemotron.data.correct.align import align, columns_of
from nemotron.data.correct.distance import count_edits
from nemotron.data.correct.edits import least_edits_of_columns, touched, vote
from nemotron.data.correct.mixed import split_mixed
from nemotron.data.correct.pair import Pair
from nemotron.data.correct.score import Answer, Rate
from nemotron.drawing.chart import HEIGHT, Line, line_chart
from nemotron.drawing.colors import standalone
from nemotron.drawing.series import Series
from nemotron.files import write_text
from nemotron.outputs import unwritable

Judged = Sequence[tuple[Pair, Answer]]
"""Pairs with the answers of one way to correct."""
FIGURES = {
    "candidates": ("TER over the number of candidates", "candidates"),
    "detection": ("Precision over recall of detection", "recall"),
    "latency": ("Milliseconds over the length of a sentence", "tokens"),
}
"""Title and horizontal axis of each file."""


def write_figures(folder: Path, ways: Mapping[str, Judged]) -> list[Path]:
    """Write the SVG files for which the answers, by the names of their files, have what they need.

    Raises:
        UserError: when the folder cannot be written.
    """
    drawn = {
        "candidates": _candidates(next(iter(ways.values()))),
        "detection": _number(_detection(name, own) for name, own in ways.items()),
        "latency": _number(_latency(name, own) for name, own in ways.items()),
    }
    written = []
    for name, lines in drawn.items():
        title, x_label = FIGURES[name]
        svg = line_chart(lines, title=title, x_label=x_label)
        if not svg:
            continue
        path, legend = folder / f"{name}.svg", {line.label: f"c{line.color % 8}" for line in lines}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(path, standalone(svg, HEIGHT, title, legend))
        except OSError as error:
            raise unwritable(error, path, "the figures before it are written") from None
        written.append(path)
    return written


def _number(series: Iterator[tuple[str, Series]]) -> list[Line]:
    found = [(name, own) for name, own in series if len(own.x)]
    return [Line(name, own, color, has_dots=True) for color, (name, own) in enumerate(found)]


def _candidates(judged: Judged) -> list[Line]:
    """Return the error rates of vote and oracles, given the first 1, 2, … candidates."""
    most = max((len(pair.candidates) for pair, _ in judged), default=0)
    rates: dict[str, list[float]] = {}
    for number in range(1, most + 1):
        totals = {"vote": Rate(), "best candidate": Rate(), "best tokens": Rate()}
        for pair, _ in judged:
            texts = [split_mixed(text) for text in pair.candidates[:number]]
            target, columns = split_mixed(pair.target or ""), columns_of(texts, str.lower)
            size = len(target)
            totals["vote"].add(count_edits(vote(columns), target), size)
            totals["best candidate"].add(min(count_edits(t, target) for t in texts), size)
            totals["best tokens"].add(least_edits_of_columns(columns, target), size)
        for name, rate in totals.items():
            rates.setdefault(name, []).append(rate.value)
    answered = Rate()
    for pair, answer in judged:
        target = split_mixed(pair.target or "")
        answered.add(count_edits(split_mixed(answer.text), target), len(target))
    places = np.arange(1.0, most + 1)
    found = {name: Series(places, np.array(values)) for name, values in rates.items()}
    found["answer"] = Series(places[-1:], np.full(len(places[-1:]), answered.value))
    return _number(iter(found.items()))


def _detection(name: str, judged: Judged) -> tuple[str, Series]:
    """Return precision over recall, as the threshold on the log-probability of tokens rises."""
    scores, wrong = [], []
    for pair, answer in judged:
        for score, is_wrong in _wrong_tokens(pair.target or "", answer):
            scores.append(score)
            wrong.append(is_wrong)
    if not any(wrong):
        return name, Series(np.empty(0), np.empty(0))
    order = np.argsort(np.array(scores), kind="stable")
    ordered, hits = np.array(scores)[order], np.cumsum(np.array(wrong)[order])
    ends = np.append(ordered[1:] != ordered[:-1], True)  # equal scores are flagged together
    precision, recall = hits / np.arange(1, len(hits) + 1), hits / hits[-1]
    return name, Series(recall[ends], precision[ends])


def _wrong_tokens(target: str, answer: Answer) -> Iterator[tuple[float, bool]]:
    """Yield the score of each chosen token, and whether the target has other characters there."""
    text = "".join(token for token, _ in answer.judged)
    places = touched(align(list(text), list(target), str.lower), list(text), list(target))
    at = 0
    for token, score in answer.judged:
        yield score, any(place in places for place in range(at, at + len(token)))
        at += len(token)


def _latency(name: str, judged: Judged) -> tuple[str, Series]:
    """Return the median time of sentences of each length."""
    times: dict[int, list[float]] = {}
    for pair, answer in judged:
        if answer.ms is not None:
            times.setdefault(len(split_mixed(pair.candidates[0])), []).append(answer.ms)
    lengths = sorted(times)
    medians = [float(np.median(times[length])) for length in lengths]
    return name, Series(np.array(lengths, np.float64), np.array(medians, np.float64))
