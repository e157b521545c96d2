"""Answers that name what a text hides, that miss it, and that name everything."""

import re
from collections import Counter
from typing import Any

import pytest

from nemotron.data.tokenizer import load_tokenizer
from nemotron.errors import UserError
from nemotron.posttrain.environments.base import BadRow, Row, build_row
from nemotron.posttrain.environments.long_context import LongContext
from nemotron.posttrain.environments.long_tasks import KINDS, NEEDLES
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


def text_of(each: Row) -> str:
    return each["responses_create_params"]["input"][0]["content"]


def oracle(prompt: str) -> list[str]:
    """Return the answer, found in the text of a prompt alone."""
    _, body, question = prompt.split("\n\n")
    if match := re.search(r"numbers? of (.+?) does the text", question):
        wanted = match[1].split(" and ")
        pairs = re.findall(r"The secret number of (\w+) is (\d+)\.", body)
        return [number for word, number in pairs if word in wanted]
    if match := re.search(r"have the value (\d+)\?", question):
        values: dict[str, str] = {}
        for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", body):
            values[name] = values.get(value, value)
        return [name for name, value in values.items() if value == match[1]]
    if match := re.search(r"Which (\w+) (?:coded )?words occur most", question):
        count = 3 if match[1] == "three" else int(match[1])
        found = Counter(word for word in body.split() if word != "...").most_common(count + 1)
        assert found[count - 1][1] > found[count][1]
        return [word for word, _ in found[:count]]
    [at] = re.findall(r"In which city is the key of (\w+) in the end", question)
    while step := re.search(rf"The key of {at} is with (\w+)\.", body):
        at = step[1]
    [place] = re.findall(rf"{at} left all keys in (\w+) under the (\w+)\.", body)
    return list(place)


@pytest.mark.slow
@pytest.mark.parametrize(("level", "tokens"), [(1, 512), (3, 2048)])
def test_prompts_have_exactly_the_length_of_their_level_and_can_be_answered(
    level: int, tokens: int
):
    encode = load_tokenizer("embedded").encode
    rows = list(LongContext().rows(2 * len(KINDS), 1, level))
    assert Counter(each["kind"] for each in rows) == dict.fromkeys(KINDS, 2)
    constant = "\\boxed{1234567, river, Oslo, lamp, ABCDE}"
    for each in rows:
        prompt = text_of(each)
        assert len(encode(prompt)) == tokens, each["kind"]
        assert sorted(oracle(prompt)) == sorted(each["expected"]), each["kind"]
        assert judge(LongContext(), each, f"\\boxed{{{', '.join(oracle(prompt))}}}") == 1
        assert judge(LongContext(), each, constant) == 0
        assert judge(LongContext(), each, prompt) == 0


def test_documents_have_two_to_five_hops_each_in_one_of_them():
    for level in range(4):
        [each] = LongContext(kinds=["multi_hop"], tokens=512).rows(1, 2, level)
        documents = re.findall(r"^Document \d+: (.*)$", text_of(each), re.MULTILINE)
        steps = [len(re.findall(r"is with|left all keys", text)) for text in documents]
        assert sum(steps) == 2 * (level + 2)  # one chain to follow, one beside it
        assert all(documents)


def test_a_needle_stands_at_its_depth():
    for kind in NEEDLES:
        for depth in (0.0, 0.25, 0.5, 1.0):
            for each in LongContext(kinds=[kind], tokens=512, depth=depth).rows(1, 1, 0):
                body = text_of(each).split("\n\n")[1]
                needles = [re.search(rf"[^.]*{number}\.", body) for number in each["expected"]]
                others = "".join(re.findall(r"The secret number of \w+ is \d+\. ?", body))
                for needle in needles:
                    assert needle
                    # up to the other needles and the sentence that the depth falls into
                    slack = (len(others) + 60) / len(body)
                    assert abs(needle.start() / len(body) - depth) <= slack, (kind, depth)


def test_frequencies_fall_with_the_square_of_the_rank():
    [each] = LongContext(kinds=["frequent_words"], tokens=8192).rows(1, 1, 0)
    counts = [n for _, n in Counter(text_of(each).split("\n\n")[1].split()).most_common()]
    parts = counts[0]
    assert counts == [int(parts * rank**-2.0) for rank in range(1, len(counts) + 1)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kinds": ["needle"]}, "kinds = "),
        ({"kinds": []}, "kinds = "),
        ({"tokens": 5}, "tokens = 5"),
        ({"depth": 2}, "depth = 2"),
        ({"depth": 0.5}, "has no meaning for variable_tracking"),
        ({"tokenizer": 3}, "tokenizer = 3"),
    ],
)
def test_options_that_cannot_be_met_are_refused(options: dict[str, Any], said: str):
    with pytest.raises(UserError, match=re.escape(said)):
        LongContext(**options)


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
