"""Code-switching: measures, word alignment, and where sentences switch."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron.data.codeswitch.links import Translations, cuts
from nemotron.data.codeswitch.measures import measure
from nemotron.data.codeswitch.switch import Rule, Segment, equivalents
from nemotron.data.codeswitch.words import languages_of

RULE = Rule(("zh", "en"), share=0.2, number=5, spf=(0.29, 0.21))


def test_measures_are_those_of_cs_metrics():
    languages = {"E": "en", "H": "hi", "u": "univ"}
    found = measure([languages[letter] for letter in "EEHHuuHHEEEHH"])
    assert found.cmi == pytest.approx(45.454545, abs=1e-6)
    assert found.m_index == pytest.approx(0.983607, abs=1e-6)
    assert found.entropy == pytest.approx(0.994030, abs=1e-6)
    assert found.burstiness == pytest.approx(-0.483509, abs=1e-6)
    assert (found.switches, found.i_index) == (3, pytest.approx(0.3))


@pytest.mark.parametrize("words", ["", "univ univ", "en", "en univ en"])
def test_a_text_of_one_language_does_not_switch(words: str):
    found = measure(words.split())
    assert (found.cmi, found.m_index, found.i_index, found.entropy) == (0, 0, 0, 0)
    assert (found.burstiness, found.switches) == (None, 0)


NOUNS = {"dog": "gou", "cat": "mao", "man": "ren", "bird": "niao", "house": "fang"}
VERBS = {"sees": "kan", "likes": "xihuan", "eats": "chi"}
COLORS = {"red": "hong", "blue": "lan", "black": "hei"}


def corpus(number: int) -> list[tuple[list[str], list[str]]]:
    """Return sentences with translations in which the color follows the noun."""
    rng = random.Random(11)
    made = []
    for _ in range(number):
        one, other = rng.choice(list(NOUNS)), rng.choice(list(NOUNS))
        verb, color = rng.choice(list(VERBS)), rng.choice(list(COLORS))
        made.append(
            ([color, one, verb, other], [NOUNS[one], COLORS[color], VERBS[verb], NOUNS[other]])
        )
    return made


def test_alignment_finds_translations_and_their_order():
    pairs = corpus(120)
    translations = Translations(pairs)
    for source, target in pairs:
        if source[1] != source[3]:
            assert translations.links(source, target) == [(1, 0), (0, 1), (2, 2), (3, 3)]


def test_segments_do_not_part_words_whose_order_changes():
    source, target = ["red", "dog", "sees", "cat"], ["gou", "hong", "kan", "mao"]
    links = [(1, 0), (0, 1), (2, 2), (3, 3)]
    assert list(equivalents(source, target, links)) == [
        Segment(0, 2, ("gou", "hong")),
        Segment(2, 3, ("kan",)),
        Segment(3, 4, ("mao",)),
    ]


@st.composite
def aligned(draw: st.DrawFn) -> tuple[int, int, list[tuple[int, int]]]:
    sizes = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    places = [st.integers(0, size - 1) for size in sizes]
    return *sizes, draw(st.lists(st.tuples(*places), unique=True, max_size=9))


@given(aligned())
def test_a_switch_never_crosses_a_link(case: tuple[int, int, list[tuple[int, int]]]):
    num_source, num_target, links = case
    source = [f"s{i}" for i in range(num_source)]
    target = [f"t{j}" for j in range(num_target)]
    places = list(cuts(num_source, num_target, links))
    assert (places[0].source, places[-1].source) == (0, num_source)
    for segment in equivalents(source, target, links):
        words = [target.index(word) for word in segment.words]
        assert words == list(range(words[0], words[-1] + 1))
        for s, t in links:
            inside = segment.start <= s < segment.stop
            assert inside == (words[0] <= t <= words[-1])
            # nor does any link cross from before the segment to behind it
            assert inside or (s < segment.start) == (t < words[0])


@given(aligned(), st.integers(0, 99))
def test_a_switched_sentence_has_each_word_or_its_translation_once(
    case: tuple[int, int, list[tuple[int, int]]], seed: int
):
    num_source, num_target, links = case
    source = [f"源{i}" for i in range(num_source)]
    target = [f"t{j}" for j in range(num_target)]
    segments = list(equivalents(source, target, links))
    for made in RULE.switched(source, segments, random.Random(seed)):
        assert len(made.words) == len(made.languages)
        for word, language in zip(made.words, made.languages, strict=True):
            assert language == ("en" if word in target else "zh")
        assert len(set(made.words)) == len(made.words)
        for s, t in links:  # both sides of a link never stand together
            assert not {source[s], target[t]} <= set(made.words)


def test_words_in_another_script_are_of_the_second_language():
    words = ["我", "去", "park", "，", "2012"]
    assert languages_of(words, ("zh", "en")) == ["zh", "zh", "en", "univ", "univ"]
    # one script for both: nothing is known of its words
    assert languages_of(["yo", "quiero", "run"], ("es", "en")) == ["es"] * 3


def variants(segments: Sequence[Segment], rule: Rule, seed: int = 1) -> list[str]:
    words = [f"源{i}" for i in range(10)]
    return [" ".join(made.words) for made in rule.switched(words, segments, random.Random(seed))]


SINGLE = [Segment(i, i + 1, (f"t{i}",)) for i in range(10)]


def test_as_many_words_switch_as_asked():
    for share, count in ((0.2, 2), (0.5, 5), (0.01, 1)):
        rule = Rule(("zh", "en"), share, 3, None)
        for made in rule.switched([f"源{i}" for i in range(10)], SINGLE, random.Random(3)):
            assert made.languages.count("en") == count
            assert made.measures.cmi == pytest.approx(10 * min(count, 10 - count))


def test_sentences_are_different_and_the_same_for_the_same_seed():
    found = variants(SINGLE, RULE)
    assert len(found) == len(set(found)) == 5
    assert found == variants(SINGLE, RULE) != variants(SINGLE, RULE, 2)
    assert variants([], RULE) == []


def test_sentences_that_switch_as_real_ones_are_kept():
    calm, lively = (Rule(("zh", "en"), 0.5, 4, (mean, 0.1)) for mean in (0.1, 0.9))
    words = [f"源{i}" for i in range(10)]
    means = [
        sum(made.measures.i_index for made in rule.switched(words, SINGLE, random.Random(5))) / 4
        for rule in (calm, lively)
    ]
    assert means[0] < 0.45 < 0.6 < means[1]
