"""The command `nemotron score`: answers of a model against the text that is right."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from nemotron.data.correct.pair import MOST_CHARACTERS, Pair, pair_of
from nemotron.data.correct.score import Answer, score
from nemotron.data.rewrite.rows import Row, Rows
from nemotron.data.rewrite.score_figures import write_figures
from nemotron.errors import UserError
from nemotron.exit_codes import DONE
from nemotron.terminal import print_text, say

T = TypeVar("T")
LONGEST_ANSWER = 10 * MOST_CHARACTERS
"""Characters of an answer; edits are counted in time by the product of two lengths."""
TITLES = {
    "source": "first candidate",
    "selected": "selected",
    "answer": "answer",
}


SIDE_BY_SIDE = (
    *(f"answer_{unit}" for unit in ("wer", "cer", "ter")),
    *("correction_precision", "correction_recall", "correction_f0.5", "detection_f1"),
    *("sentences_better", "sentences_worse", "median_ms"),
)
"""Measures by which two ways to correct are compared."""
Measures = dict[str, float | int | None]


def score_file(
    answers: Path,
    references: Path,
    *,
    against: Path | None = None,
    figures: Path | None = None,
    as_json: bool,
) -> int:
    """Print the measures of a file of answers; `against` has those of another way to correct.

    `figures` is a folder for drawings.

    Raises:
        UserError: when a file cannot be read, or they do not belong together.
    """
    pairs = _read_pairs(references)

    paths = [answers] if against is None else [answers, against]
    ways = {
        str(path): list(_matched(pairs, _read_answers(path), path, references)) for path in paths
    }
    measures, other = (
        score(ways[str(path)]).described() if path is not None else None
        for path in (answers, against)
    )
    assert measures is not None
    if figures is not None:
        for written in write_figures(figures, {Path(path).name: own for path, own in ways.items()}):
            say(f"figure written: {written}")
    if as_json:
        print_text(json.dumps({**measures, "against": other} if other else measures, indent=2))
        return DONE
    lines = [*_table(measures)]
    if against is not None and other is not None:
        lines += ["", *_side_by_side(measures, other, answers, against)]
    for line in lines:
        print_text(line)
    return DONE


def _read_pairs(path: Path) -> dict[str, Pair]:
    """Return the pairs by their names, or by their numbers where they have none."""
    pairs: dict[str, Pair] = {}
    for number, (where, row) in enumerate(_rows(path)):
        try:
            pair = pair_of(row)
        except ValueError as error:
            raise UserError(
                f"{error}; give pairs with candidates and target.", where=where
            ) from None
        _add(pairs, _name(row, number), pair, where)
    return pairs


def _read_answers(path: Path) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    for number, (where, row) in enumerate(_rows(path)):
        text, selected, ms = row.get("answer"), row.get("selected"), row.get("ms")
        if not isinstance(text, str):
            raise UserError(
                "has no answer; give a file that `nemotron correct` wrote.", where=where
            )
        if len(text) > LONGEST_ANSWER:
            rule = f"has an answer of {len(text):,} characters; at most {LONGEST_ANSWER:,} do."
            raise UserError(rule, where=where)
        if not isinstance(selected, str | None) or not isinstance(ms, int | float | None):
            raise UserError(
                "has a selected that is not text, or ms that are not a number.", where=where
            )
        answer = Answer(text, selected, ms, _judged(row.get("judged"), where))
        _add(answers, _name(row, number), answer, where)
    return answers


def _judged(found: object, where: str) -> tuple[tuple[str, float], ...]:
    if found is None:
        return ()
    try:
        pairs = tuple((token, float(score)) for token, score in found)  # type: ignore[attr-defined]
        if all(isinstance(token, str) and math.isfinite(score) for token, score in pairs):
            return pairs
    except (TypeError, ValueError):
        pass
    rule = "has a judged that is not a list of tokens, each with a log-probability."
    raise UserError(rule, where=where)


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    columns = (
        "answer",
        "id",
        "target",
        "candidates",
        "scores",
        "language",
        "selected",
        "ms",
        "judged",
    )
    for place, row in Rows([str(path)], columns, max_bad_rows=0):
        yield place(), row


def _name(row: Row, number: int) -> str:
    return str(row["id"]) if row.get("id") is not None else f"number {number + 1}"


def _add(found: dict[str, T], name: str, value: T, where: str) -> None:
    if name in found:
        raise UserError(
            f"has the id {name}, which an earlier row has; give each its own.", where=where
        )
    found[name] = value


def _matched(
    pairs: dict[str, Pair], answers: dict[str, Answer], path: Path, references: Path
) -> Iterator[tuple[Pair, Answer]]:
    for name in pairs:
        if name not in answers:
            lacking = sum(name not in answers for name in pairs)
            raise UserError(
                f"has no answer for {lacking:,} of {len(pairs):,} pairs of {references}, "
                f"such as {name}; correct all of them, or give their references alone.",
                where=str(path),
            )
    for name in answers:
        if name not in pairs:
            raise UserError(f"has an answer to {name}, which {references} lacks.", where=str(path))
    for name, pair in pairs.items():
        yield pair, answers[name]


def _table(measures: Measures) -> Iterator[str]:
    yield f"{measures['sentences']:,} sentences{'':<14}WER     CER     TER"
    for key, title in TITLES.items():
        if f"{key}_wer" in measures:
            rates = "  ".join(f"{measures[f'{key}_{unit}']:.4f}" for unit in ("wer", "cer", "ter"))
            yield f"{title:<28}{rates}"
    for key, title in (
        ("vote", "vote in each column"),
        ("candidate_oracle", "best candidate"),
        ("column_oracle", "best token of each column"),
    ):
        yield f"{title:<44}{measures[f'{key}_ter']:.4f}"
    for key, f in (("correction", "f0.5"), ("detection", "f1")):
        parts = (f"{key}_precision", f"{key}_recall", f"{key}_{f}")
        precision, recall, mean = (measures[part] for part in parts)
        yield f"{key}: precision {precision:.4f}, recall {recall:.4f}, {f.upper()} {mean:.4f}"
    yield f"sentences made better: {measures['sentences_better']:,}, made worse: " + (
        f"{measures['sentences_worse']:,}"
    )
    if "median_ms" in measures:
        yield f"time of a sentence: {measures['median_ms']:.1f} ms (median)"


def _side_by_side(
    measures: Measures, other: Measures, answers: Path, against: Path
) -> Iterator[str]:
    yield f"{'':<24}{answers.name:>20}{against.name:>20}"
    for key in SIDE_BY_SIDE:
        if key in measures and key in other:
            own, theirs = (f"{values[key]:.4g}" for values in (measures, other))
            yield f"{key:<24}{own:>20}{theirs:>20}"
    mine, theirs_ms = measures.get("median_ms"), other.get("median_ms")
    if mine and theirs_ms:
        yield f"{answers.name} takes {mine / theirs_ms:.3f} of the time of {against.name}"
