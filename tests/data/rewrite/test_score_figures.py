"""The lines of the figures of corrected text, by hand."""

import pytest

from nemotron.data.correct.pair import Pair
from nemotron.data.correct.score import Answer
from nemotron.data.rewrite.score_figures import _candidates, _detection, _latency


def pair_of(target: str, *candidates: str) -> Pair:
    return Pair("", candidates or (target,), target, None, None)


def test_oracles_improve_with_each_candidate() -> None:
    pair = pair_of("a b c d", "a b e f", "a g c f", "h b c d")
    lines = {line.label: line.series for line in _candidates([(pair, Answer("a b c"))])}
    assert {name: series.y.tolist() for name, series in lines.items()} == {
        "vote": [0.5, 0.5, 0.25],  # f wins two of three
        "best candidate": [0.5, 0.5, 0.25],
        "best tokens": [0.5, 0.25, 0.0],
        "answer": [0.25],
    }
    assert lines["vote"].x.tolist() == [1, 2, 3]
    assert lines["answer"].x.tolist() == [3]


@pytest.mark.parametrize("spaces", [False, True])
def test_precision_and_recall_follow_the_threshold(spaces: bool) -> None:
    gap = " " if spaces else ""
    target, text = f"我们{gap}去", f"我门{gap}去"
    tokens = list(text)
    scores = {"我": -2.0, "门": -1.0, "去": -0.5, " ": -0.1}
    judged = tuple((token, scores[token]) for token in tokens)
    _, series = _detection("x", [(pair_of(target), Answer(text, text, 1.0, judged))])
    # 我 is flagged first, wrongly; then 门, rightly
    assert series.y.tolist()[:2] == [0.0, 0.5]
    assert series.x.tolist()[:2] == [0.0, 1.0]


def test_times_are_medians_by_length() -> None:
    times = [(3, 1.0), (3, 2.0), (3, 9.0), (5, 4.0)]
    judged = [(pair_of("我" * length), Answer("", None, ms)) for length, ms in times]
    _, series = _latency("x", judged)
    assert (series.x.tolist(), series.y.tolist()) == ([3, 5], [2.0, 4.0])
