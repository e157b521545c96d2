"""Measures of corrected text, against jiwer and by hand."""

import random

import pytest

from nemotron.data.correct.align import align, columns_of
from nemotron.data.correct.distance import count_edits
from nemotron.data.correct.edits import (
    Change,
    changes,
    least_edits_of_columns,
    touched,
    vote,
)
from nemotron.data.correct.mixed import join_mixed, split_mixed
from nemotron.data.correct.pair import Pair
from nemotron.data.correct.score import Answer, Found, Rates, Score, score

WORDS = ["a", "bb", "ab", "我们", "去", "park", "e"]


def texts(seed: int, number: int) -> list[tuple[str, str]]:
    """Return pairs of target and text; no target is empty, for which jiwer has no rate."""
    rng = random.Random(seed)
    return [
        (
            " ".join(rng.choices(WORDS, k=rng.randint(1, 9))),
            " ".join(rng.choices(WORDS, k=rng.randint(0, 9))),
        )
        for _ in range(number)
    ]


def rates(pairs: list[tuple[str, str]]) -> Rates:
    found = Rates()
    for target, text in pairs:
        found.add(text, target)
    return found


def test_rates_are_those_that_jiwer_gave():
    """Of the first 40 pairs with seed 1, from jiwer 4.0.0."""
    found = rates(texts(1, 40))
    assert found.wer.value == pytest.approx(1.1445086705202312, abs=1e-12)
    assert found.cer.value == pytest.approx(1.0748898678414096, abs=1e-12)


def test_rates_are_those_of_jiwer_on_1000_pairs():
    jiwer = pytest.importorskip("jiwer")
    pairs = texts(2, 1000)
    targets, answers = map(list, zip(*pairs, strict=True))
    found = rates(pairs)
    assert found.wer.value == pytest.approx(jiwer.wer(targets, answers), abs=1e-12)
    assert found.cer.value == pytest.approx(jiwer.cer(targets, answers), abs=1e-12)


def test_the_rate_of_an_empty_reference_is_the_number_of_insertions():
    assert rates([("", "one two")]).wer.value == 2


def test_tokens_of_mixed_text_are_characters_and_words():
    assert split_mixed("我们go to 公园, ok？") == [*"我们", "go", "to", *"公园", ",", "ok", "？"]
    assert join_mixed(split_mixed("我们 go to 公园")) == "我们go to公园"
    assert join_mixed(["我们", "go", "to", "公园"]) == "我们go to公园"


def test_edits_are_merged_with_their_neighbors():
    source, text = list("abcdef"), list("axydefz")
    alignment = align(source, text, str)
    assert changes(alignment, source, text) == [
        Change(1, 3, ("x", "y")),
        Change(6, 6, ("z",)),
    ]
    assert touched(alignment, source, text) == {1, 2, 6}
    longer = list("qabcdef")
    assert touched(align(source, longer, str), source, longer) == {0}


def test_precision_and_recall_are_those_of_errant():
    found = Found()
    assert (found.precision, found.recall, found.f(0.5)) == (1, 1, 1)
    found.add({1, 2, 3}, {3, 4})
    assert (found.right, found.wrong, found.missed) == (1, 2, 1)
    # (1 + 0.25) * 1/3 * 1/2 / (0.25 * 1/3 + 1/2)
    assert found.f(0.5) == pytest.approx(0.3571428571)
    found = Found(right=0, wrong=2, missed=0)
    assert (found.precision, found.recall, found.f(1)) == (0, 1, 0)


def test_oracles_and_vote_of_columns():
    columns = columns_of([list("abcx"), list("azc"), list("qbcd")], str)
    assert [*map("".join, [[t or "_" for t in line] for line in columns.lines])] == [
        "abcx",
        "azc_",
        "qbcd",
    ]
    assert vote(columns) == list("abcx")
    assert least_edits_of_columns(columns, list("qzcd")) == 0
    assert least_edits_of_columns(columns, list("abc")) == 0
    assert least_edits_of_columns(columns, list("abcdd")) == 1
    assert least_edits_of_columns(columns, list("k")) == 3


def test_a_score_counts_what_a_correction_did():
    pairs = [
        (Pair("1", ("abxd", "abcd"), "abcd", None, None), Answer("abcd", "abxd", 2.0)),
        (Pair("2", ("ab",), "ab", None, None), Answer("aq", "ab", 4.0)),
        (Pair("3", ("a b x", "a c"), "a c d", None, None), Answer("a c x", "a c", 9.0)),
    ]
    # characters of these texts are words, but for the third
    found = score(
        [
            (
                Pair(
                    p.id,
                    tuple(" ".join(c.replace(" ", "")) for c in p.candidates),
                    " ".join((p.target or "").replace(" ", "")),
                    None,
                    None,
                ),
                Answer(
                    " ".join(a.text.replace(" ", "")),
                    " ".join((a.selected or "").replace(" ", "")),
                    a.ms,
                ),
            )
            for p, a in pairs
        ]
    ).described()
    assert found["sentences"] == 3
    assert found["source_wer"] == pytest.approx(3 / 9)
    assert found["answer_wer"] == pytest.approx(2 / 9)
    assert found["selected_wer"] == pytest.approx(2 / 9)
    assert found["candidate_oracle_ter"] == pytest.approx(1 / 9)
    assert (found["sentences_better"], found["sentences_worse"]) == (2, 1)
    # right: c for x; wrong: q for b, and c for b alone; missed: "c d" for "b x"
    assert found["correction_precision"] == pytest.approx(1 / 3)
    assert found["correction_recall"] == pytest.approx(1 / 2)
    # places: 2 of the first, and b of the third; x of the third is missed
    assert found["detection_precision"] == pytest.approx(2 / 3)
    assert found["detection_recall"] == pytest.approx(2 / 3)
    assert found["median_ms"] == 4.0


def test_the_edits_of_oracles_are_at_most_those_of_any_candidate():
    rng = random.Random(4)
    for _ in range(200):
        candidates = [rng.choices("abcd", k=rng.randint(1, 6)) for _ in range(3)]
        target = rng.choices("abcd", k=rng.randint(0, 6))
        best = min(count_edits(tokens, target) for tokens in candidates)
        assert least_edits_of_columns(columns_of(candidates, str), target) <= best


def test_without_selected_texts_there_are_no_rates_of_them():
    total = Score()
    total.add(Pair("1", ("a",), "a", None, None), Answer("a"))
    assert not [name for name in total.described() if name.startswith(("selected", "median"))]
