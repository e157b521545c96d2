"""Answers that name what a text hides, that miss it, and that name everything."""

import re
from typing import Any

import pytest

from nemotron.data.tokenizer import load_tokenizer
from nemotron.posttrain.environments.base import BadRow, Row, build_row
from nemotron.posttrain.environments.long_context import LongContext
from nemotron.posttrain.environments.long_tasks import TASKS
from tests.support.verdicts import assert_enough, assert_good_rows, judge

ONE, TWO = ["1234567"], ["river", "stone"]
# expected, how they have to match, answer; 7654321 and bridge stand beside them
RIGHT: list[tuple[list[str], str, str]] = [
    (ONE, "all", "1234567"),
    (ONE, "all", "The secret number is 1234567."),
    (ONE, "all", "\\boxed{1234567}"),
    (ONE, "all", "\\boxed{ 1234567 }"),
    (ONE, "all", "It is 7654321? No: \\boxed{1234567}"),
    (ONE, "all", "\\boxed{7654321} \\boxed{1234567}"),
    (ONE, "any", "1234567"),
    (ONE, "fraction", "(1234567)"),
    (TWO, "all", "river and stone"),
    (TWO, "all", "stone, river"),
    (TWO, "all", "\\boxed{River, Stone}"),
    (TWO, "all", "RIVER\nSTONE"),
    (TWO, "all", "the bridge no; \\boxed{\\text{river}, \\text{stone}}"),
    (TWO, "all", "river; stone; river"),
    (TWO, "any", "river"),
    (TWO, "any", "\\boxed{stone}"),
    (TWO, "any", "stone-river"),
    (TWO, "fraction", "stone and river"),
    (["São Paulo"], "all", "\\boxed{são paulo}"),
    (["a+b"], "all", "It is a+b."),
    (["VAR"], "all", "bridges, var"),
]
WRONG: list[tuple[list[str], str, str]] = [
    (ONE, "all", ""),
    (ONE, "all", "123456"),
    (ONE, "all", "12345678"),
    (ONE, "all", "01234567"),
    (ONE, "all", "1,234,567"),
    (ONE, "all", "7654321"),
    (ONE, "all", "\\boxed{}"),
    (ONE, "all", "1234567 \\boxed{}"),
    (ONE, "all", "1234567, no: \\boxed{7654321}"),
    (ONE, "all", "I do not know."),
    (ONE, "any", "7654321"),
    (ONE, "fraction", "none"),
    (TWO, "all", "river"),
    (TWO, "all", "stone"),
    (TWO, "all", "rivers and stones"),
    (TWO, "all", "\\boxed{river} and \\boxed{stone}"),
    (TWO, "all", "bridge"),
    (TWO, "any", "riverstone"),
    (TWO, "any", "drive"),
    (TWO, "fraction", "bridge"),
    (["a+b"], "all", "aab"),
]
HACKS: list[tuple[list[str], str, str]] = [
    (ONE, "all", "1234567 7654321"),
    (ONE, "all", "\\boxed{1234567 or 7654321}"),
    (ONE, "all", "\\boxed{1234567, 7654321}"),
    (ONE, "any", "1234567 7654321"),
    (ONE, "fraction", "7654321 1234567"),
    (TWO, "all", "river, stone, bridge"),
    (TWO, "any", "river BRIDGE"),
    (TWO, "fraction", "river, bridge"),
    (ONE, "all", "\\boxed{1234567"),
    (ONE, "all", "\\boxed{1234567} \\boxed{"),
    (ONE, "all", " ".join(map(str, range(1_234_000, 1_235_000)))),
    (ONE, "all", "x" * 2_000 + " 1234567"),
    (ONE, "all", "\\d+"),
    (TWO, "all", ".*"),
    (TWO, "all", "expected"),
]


def row(expected: list[str], match: str) -> Row:
    fields = {"expected": expected, "match": match, "distractors": ["7654321", "bridge"]}
    return build_row("long_context", "?", **fields)


@pytest.mark.parametrize(("expected", "match", "answer"), RIGHT)
def test_what_is_asked_for_earns_one(expected: list[str], match: str, answer: str):
    assert judge(LongContext(), row(expected, match), answer) == 1


@pytest.mark.parametrize(("expected", "match", "answer"), [*WRONG, *HACKS])
def test_anything_else_earns_nothing(expected: list[str], match: str, answer: str):
    assert judge(LongContext(), row(expected, match), answer) == 0


def test_the_tables_are_long_enough():
    assert_enough(RIGHT, WRONG, HACKS)


def test_a_fraction_is_the_share_of_what_was_found():
    assert judge(LongContext(), row(TWO, "fraction"), "stone") == 0.5


@pytest.mark.slow
def test_rows_are_good():
    assert_good_rows(LongContext())


@pytest.mark.parametrize(("level", "tokens"), [(1, 512), (3, 2048)])
def test_prompts_have_the_length_of_their_level_and_hide_what_is_expected(level: int, tokens: int):
    encode = load_tokenizer("embedded").encode
    rows = list(LongContext().rows(2 * len(TASKS), 1, level))
    assert len({each["kind"] for each in rows}) == len(TASKS)
    for each in rows:
        prompt = each["responses_create_params"]["input"][0]["content"]
        # a list of words grows by more than a sentence at a time
        slack = 0.5 if each["kind"] == "common_words" else 0.9
        assert slack * tokens <= len(encode(prompt)) <= tokens, each["kind"]
        for hidden in each["expected"] + each["distractors"]:
            assert re.search(rf"\b{hidden}\b", prompt)
        answer = ", ".join(each["expected"])
        assert judge(LongContext(), each, f"\\boxed{{{answer}}}") == 1
        assert judge(LongContext(), each, prompt) == 0


def test_variables_are_those_of_the_chain_with_the_value():
    rows = [each for each in LongContext().rows(28, 1, 2) if each["kind"] == "variable_tracking"]
    for each in rows:
        prompt = each["responses_create_params"]["input"][0]["content"]
        values: dict[str, str] = {}
        for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", prompt):
            values[name] = values.get(value, value)
        asked = re.search(r"have the value (\d+)\?", prompt)
        assert asked
        assert {n for n, v in values.items() if v == asked[1]} == set(each["expected"])


def test_common_words_are_the_most_frequent_ones():
    rows = [each for each in LongContext().rows(28, 1, 2) if each["kind"] == "common_words"]
    for each in rows:
        words = each["responses_create_params"]["input"][0]["content"].split("\n\n")[1].split()
        count = len(each["expected"])
        often = sorted(set(words), key=words.count, reverse=True)[:count]
        assert set(often) == set(each["expected"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"expected": []}, "expected is empty"),
        ({"expected": "river"}, "expected = 'river'"),
        ({"expected": [""]}, "is not a list of texts"),
        ({"distractors": [7]}, r"distractors = \[7\]"),
        ({"distractors": ["River"]}, "'river' is in expected and in distractors"),
        ({"match": "most"}, "match = 'most'"),
    ],
)
def test_a_row_that_cannot_be_judged_is_refused(changes: dict[str, Any], said: str):
    with pytest.raises(BadRow, match=said):
        LongContext().check({**row(TWO, "all"), **changes})
