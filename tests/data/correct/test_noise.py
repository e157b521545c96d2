"""Noise: published proportions, and what a token is taken for."""

import random
from collections import Counter
from itertools import islice
from math import sqrt

import pytest

from nemotron.data.correct.grammar import grammar, pinyin_of, sentences
from nemotron.data.correct.noise import Confusions, Edit, Noise, chances

SENTENCES = [list("".join(words)) for words in islice(sentences(3), 300)]
COUNTS = Counter(token for sentence in SENTENCES for token in sentence)
CONFUSIONS = Confusions(COUNTS, pinyin_of)


def within(count: int, number: int, probability: float) -> bool:
    """Say whether a count lies within three standard deviations."""
    return abs(count - number * probability) <= 3 * sqrt(number * probability * (1 - probability))


def wrong() -> list[tuple[bool, ...]]:
    """Return for each token which candidates have it wrong: one token at a time is a text."""
    noise, rng = Noise(CONFUSIONS), random.Random(5)
    tokens = [token for sentence in SENTENCES for token in sentence]
    return [tuple(c != [token] for c in noise.draw([token], rng)) for token in tokens * 3]


def test_errors_have_the_published_proportions():
    found = wrong()
    for number, rate in enumerate((0.115, 0.122, 0.128, 0.135)):
        assert within(sum(errors[number] for errors in found), len(found), rate)
    assert within(sum(all(errors) for errors in found), len(found), 0.025)
    touched = [errors for errors in found if any(errors)]
    assert within(len(touched), len(found), 0.2)
    assert within(sum(not all(errors) for errors in touched), len(touched), 0.875)


def test_edits_have_the_published_proportions():
    kinds: Counter[str] = Counter()
    noise, rng = Noise(CONFUSIONS, candidates=1, rate=1.0), random.Random(1)
    for _ in range(4000):
        [found] = noise.draw(["我"], rng)
        kinds[Edit.DELETE.name if not found else "SUB" if len(found) == 1 else "INS"] += 1
    assert within(kinds["SUB"], 4000, 4 / 7)
    assert within(kinds["INS"], 4000, 1 / 7)
    assert within(kinds["DELETE"], 4000, 2 / 7)


def test_another_candidate_repeats_an_insertion_as_published():
    noise, rng = Noise(CONFUSIONS, candidates=2, rate=1.0), random.Random(2)
    drawn = [noise.draw(["我"], rng) for _ in range(9000)]
    both = [lines for lines in drawn if all(len(line) == 2 for line in lines)]
    # an insertion first (1/7), the other touched (1/2) by an insertion (3/7)
    assert within(len(both), 9000, 1 / 7 * 1 / 2 * 3 / 7)
    # 0.4, and else one of all tokens
    assert within(sum(a == b for a, b in both), len(both), 0.4 + 0.6 / len(COUNTS))


def test_a_token_is_taken_for_what_sounds_like_it():
    language = grammar().pinyin
    assert {language[mate] for mate in CONFUSIONS.of("是")[:5]} == {"shi"}
    assert "是" not in CONFUSIONS.of("是")
    rng = random.Random(9)
    drawn = Counter(CONFUSIONS.draw("是", rng) for _ in range(7000))
    assert drawn["是"] == 0
    # nine of ten by rank, the weights of which sum to 43
    nearest = CONFUSIONS.of("是")[0]
    assert within(drawn[nearest], 7000, 0.9 * 6 / 43 + 0.1 / len(COUNTS))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 16])
def test_any_number_of_candidates_has_rising_chances(count: int):
    found = chances(count)
    assert len(found) == count
    assert sum(found) == pytest.approx(1)
    assert list(found) == sorted(found)


def test_the_same_seed_draws_the_same():
    draws = [
        [Noise(CONFUSIONS).draw(sentence, random.Random(seed)) for sentence in SENTENCES[:20]]
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
