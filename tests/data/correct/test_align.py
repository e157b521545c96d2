"""Alignment, columns and durations: golden values and an exhaustive search."""

import itertools
import random
from collections.abc import Iterator, Sequence
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron.data.correct.align import align, columns_of, durations_of, row_durations
from nemotron.data.correct.grammar import pinyin_of
from nemotron.data.correct.sound import distance

PAIRS = tuple[tuple[int | None, int | None], ...]


def show(line: Sequence[str | None]) -> str:
    return "".join("_" if token is None else token for token in line)


@pytest.mark.parametrize(
    ("candidates", "anchor", "columns"),
    [
        (
            "我们去公园 我门去公园 我们去工园了 我们公园",
            2,
            "我们去公园_ 我门去公园_ 我们去工园了 我们_公园_",
        ),
        ("今天天气好 今天气好 金天天气很好", 2, "今天天气_好 今_天气_好 金天天气很好"),
        (
            "北京大学 背景大学 北京学 北京的大学",
            3,
            "北京_大学 背景_大学 北京__学 北京的大学",
        ),
    ],
)
def test_columns_are_those_of_fastcorrect(candidates: str, anchor: int, columns: str):
    found = columns_of([list(text) for text in candidates.split()], pinyin_of)
    assert found.anchor == anchor
    assert [show(line) for line in found.lines] == columns.split()


def test_columns_of_words_that_sound_as_they_are_written():
    texts = ["A B C D E", "A B2 C D2 E", "A B C E", "A B2 C D2 E2"]
    found = columns_of([text.split() for text in texts], str)
    expected = ["A B C D E", "A B2 C D2 E", "A B C _ E", "A B2 C D2 E2"]
    assert [" ".join(token or "_" for token in line) for line in found.lines] == expected
    # of equally long candidates the first, here with marks of one character
    shorter = [text.replace("B2", "b").replace("D2", "d").replace("E2", "e") for text in texts]
    assert columns_of([text.split() for text in shorter], str).anchor == 0


@pytest.mark.parametrize(
    ("source", "target", "cost", "durations"),
    [
        ("我门去公园", "我们去公园", 996000, [1, 1, 1, 1, 1]),
        ("北京的大学", "北京大学", 996002, [1, 1, 0, 1, 1]),
        ("今天气很好", "今天天气很好", 995004, [2, 1, 1, 1, 1]),
        ("天汽好", "天气很好", 1998003, [1, 2, 1]),
        ("天汽", "天很气", 1999003, [1, 2]),
    ],
)
def test_costs_and_durations_are_those_of_fastcorrect(
    source: str, target: str, cost: int, durations: list[int]
):
    assert align(source, target, pinyin_of).cost == cost
    assert durations_of(source, target, pinyin_of) == durations


def every_alignment(rows: int, columns: int) -> Iterator[PAIRS]:
    """Yield every way to pair or leave alone the tokens of two texts."""
    for count in range(min(rows, columns) + 1):
        for left in itertools.combinations(range(rows), count):
            for right in itertools.combinations(range(columns), count):
                pairs = set(zip(left, right, strict=True))
                pairs |= {(i, None) for i in range(rows) if i not in left}
                pairs |= {(None, j) for j in range(columns) if j not in right}
                yield tuple(pairs)


SOUNDS = {"a": "ba", "b": "ba", "c": "bau", "d": "gim"}


@cache
def least(first: str, second: str) -> tuple[int, int, int]:
    """Return edits, negative matches and distance of the best of all alignments."""
    found = []
    for pairs in every_alignment(len(first), len(second)):
        edits = matches = apart = 0
        for i, j in pairs:
            one, other = "" if i is None else first[i], "" if j is None else second[j]
            edits, matches = edits + (one != other), matches + (one == other)
            if one != other:
                apart += distance(SOUNDS.get(one, ""), SOUNDS.get(other, ""))
        found.append((edits, -matches, apart))
    return min(found)


def test_the_alignment_is_the_best_of_all_on_500_small_cases():
    rng = random.Random(7)
    for _ in range(500):
        one, other = ("".join(rng.choices("abcd", k=rng.randint(0, 5))) for _ in range(2))
        found = align(one, other, SOUNDS.__getitem__)
        assert (found.edits, -found.matches, found.distance) == least(one, other), (one, other)


def test_a_match_outweighs_sounds_of_any_length():
    sounds = {"L": "x" * 599, "b": "x" * 600, "M": "x" * 601}.__getitem__
    found = align("Lb", "bM", sounds)  # two pairs would differ by two letters
    assert (found.edits, found.matches, found.distance) == (2, 1, 1200)


texts = st.lists(st.sampled_from("abcd"), max_size=7)


@given(texts, texts)
def test_the_cost_does_not_depend_on_the_direction(one: list[str], other: list[str]):
    there, back = (align(*both, SOUNDS.__getitem__) for both in ((one, other), (other, one)))
    assert there.cost == back.cost


@given(st.lists(texts, min_size=1, max_size=5), texts)
def test_columns_without_voids_are_the_candidates_and_durations_fill_the_target(
    candidates: list[list[str]], target: list[str]
):
    found = columns_of(candidates, SOUNDS.__getitem__)
    assert len({len(line) for line in found.lines}) == 1
    for tokens, line in zip(candidates, found.lines, strict=True):
        assert [token for token in line if token is not None] == tokens
        durations = durations_of(tokens, target, SOUNDS.__getitem__)
        assert sum(durations) == (len(target) if tokens else 0)
        placed = row_durations(line, durations)
        assert [d for d, token in zip(placed, line, strict=True) if token] == durations
    # no column is empty
    assert all(any(column) for column in zip(*found.lines, strict=True))


def test_inserted_tokens_are_divided_by_sound_then_evenly():
    sounds = {"a": "kaba", "b": "mi", "c": "ka", "d": "bami", "k": "ka", "z": "ba", "m": "mi"}
    sounds["x"] = "xxx"
    assert durations_of("ab", "kzm", sounds.__getitem__) == [2, 1]
    assert durations_of("cd", "kzm", sounds.__getitem__) == [1, 2]
    assert durations_of("ab", "axxxxb", sounds.__getitem__) == [3, 3]
    assert durations_of("ab", "xab", sounds.__getitem__) == [2, 1]
    assert durations_of("ab", "abx", sounds.__getitem__) == [1, 2]
