"""Each constraint fulfilled, broken, and pretended to be fulfilled."""

from typing import Any

import pytest

from nemotron.posttrain.environments.base import BadRow, Row, build_row
from nemotron.posttrain.environments.constraints import CONSTRAINTS
from nemotron.posttrain.environments.if_constraints import IfConstraints
from nemotron.posttrain.environments.instructions import CONFLICTS, FAMILIES, MAKERS, SEPARATELY
from tests.support.verdicts import assert_enough, assert_good_rows, judge

KEY, LENGTH, CONTENT = "keywords:", "length_constraints:", "detectable_content:"
FORMAT, CASE = "detectable_format:", "change_case:"
TWICE = {"keyword": "sea", "frequency": 2, "relation": "at least"}
FEWER = {"keyword": "sea", "frequency": 2, "relation": "less than"}
THREE_E = {"letter": "e", "let_frequency": 3, "let_relation": "at least"}
NTH = {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"}
SECTIONS = {"section_spliter": "Section", "num_sections": 2}
# constraint, its arguments, answer
Case = tuple[str, dict[str, Any], str]
RIGHT: list[Case] = [
    (KEY + "existence", {"keywords": ["sea", "sun"]}, "The Sun over the sea."),
    (KEY + "frequency", TWICE, "Sea, sea!"),
    (KEY + "frequency", FEWER, "One sea and seaweed."),
    (KEY + "forbidden_words", {"forbidden_words": ["sea"]}, "A season by the seaside."),
    (KEY + "letter_frequency", THREE_E, "Eleven."),
    (LENGTH + "number_sentences", {"num_sentences": 2, "relation": "at least"}, "Yes. No!"),
    (LENGTH + "number_sentences", {"num_sentences": 2, "relation": "less than"}, "Mr. A is 1.5 m."),
    (LENGTH + "number_words", {"num_words": 3, "relation": "at least"}, "It's a well-known."),
    (LENGTH + "number_words", {"num_words": 3, "relation": "less than"}, "Only two"),
    (LENGTH + "number_paragraphs", {"num_paragraphs": 2}, "One.\n***\nTwo."),
    (LENGTH + "nth_paragraph_first_word", NTH, "First.\n\nThen came more."),
    (LENGTH + "number_lines", {"num_lines": 2, "relation": "exactly"}, "a\n\nb\n"),
    (CONTENT + "number_placeholders", {"num_placeholders": 2}, "Dear [name], at [the place]."),
    (CONTENT + "postscript", {"postscript_marker": "P.S."}, "Hello.\nP.S. Bye"),
    (FORMAT + "number_bullet_lists", {"num_bullets": 2}, "List:\n* a\n- b"),
    (FORMAT + "constrained_response", {}, "My answer is no."),
    (FORMAT + "number_highlighted_sections", {"num_highlights": 2}, "*one* and **two**"),
    (FORMAT + "multiple_sections", SECTIONS, "Section 1\nA\nSection 2: B"),
    (FORMAT + "json_format", {}, '```json\n{"a": 1}\n```'),
    (FORMAT + "json_format", {}, '{"a": []}'),
    (FORMAT + "title", {}, "<<a title>> text"),
    ("combination:two_responses", {}, "One answer.\n******\nAnother."),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "Say it. Done."),
    ("startend:end_checker", {"end_phrase": "Good night."}, "So, good night."),
    ("startend:quotation", {}, '"All of it."'),
    (
        CASE + "capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "BIG and LOUD",
    ),
    (CASE + "english_capital", {}, "ALL OF IT, 3 TIMES"),
    (CASE + "english_lowercase", {}, "all of it, 3 times"),
    ("punctuation:no_comma", {}, "One and two."),
]
WRONG: list[Case] = [
    (KEY + "existence", {"keywords": ["sea", "sun"]}, "The sea."),
    (KEY + "frequency", TWICE, "A sea and seaweed."),
    (KEY + "frequency", FEWER, "Sea and sea."),
    (KEY + "forbidden_words", {"forbidden_words": ["sea"]}, "At SEA."),
    (KEY + "letter_frequency", THREE_E, "Eve is."),
    (LENGTH + "number_sentences", {"num_sentences": 2, "relation": "at least"}, "Dr. Who is here."),
    (LENGTH + "number_sentences", {"num_sentences": 2, "relation": "less than"}, "Yes. No."),
    (LENGTH + "number_words", {"num_words": 4, "relation": "at least"}, "It's a well-known."),
    (LENGTH + "number_words", {"num_words": 3, "relation": "less than"}, "One two three"),
    (LENGTH + "number_paragraphs", {"num_paragraphs": 2}, "One.\n\nTwo."),
    (LENGTH + "nth_paragraph_first_word", NTH, "Then came more.\n\nLast."),
    (LENGTH + "nth_paragraph_first_word", NTH, "First.\n\nThen.\n\nMore."),
    (LENGTH + "number_lines", {"num_lines": 2, "relation": "exactly"}, "a\nb\nc"),
    (CONTENT + "number_placeholders", {"num_placeholders": 2}, "Dear [name],"),
    (CONTENT + "postscript", {"postscript_marker": "P.S."}, "P.S. first\nThe end."),
    (FORMAT + "number_bullet_lists", {"num_bullets": 2}, "* a\n* b\n* c"),
    (FORMAT + "constrained_response", {}, "My answer is unknown."),
    (FORMAT + "number_highlighted_sections", {"num_highlights": 2}, "*one* and two"),
    (FORMAT + "multiple_sections", SECTIONS, "Section 1\nA"),
    (FORMAT + "json_format", {}, "{'a': 1}"),
    (FORMAT + "title", {}, "<a title> text"),
    ("combination:two_responses", {}, "One answer.\n***\nAnother."),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "I say it. Done."),
    ("startend:end_checker", {"end_phrase": "Good night."}, "Good night. Bye."),
    ("startend:quotation", {}, '"All" of it.'),
    (
        CASE + "capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "BIG and Loud",
    ),
    (CASE + "english_capital", {}, "ALL OF iT"),
    (CASE + "english_lowercase", {}, "all of It"),
    ("punctuation:no_comma", {}, "One, two."),
]
HACKS: list[Case] = [
    ("punctuation:no_comma", {}, ""),
    ("punctuation:no_comma", {}, "..."),
    ("punctuation:no_comma", {}, "One\uff0c two"),
    (KEY + "forbidden_words", {"forbidden_words": ["sea"]}, "  \n"),
    (KEY + "frequency", FEWER, "!"),
    (LENGTH + "number_words", {"num_words": 3, "relation": "less than"}, ""),
    (LENGTH + "number_sentences", {"num_sentences": 3, "relation": "at least"}, "Yes. . . . ."),
    (LENGTH + "number_sentences", {"num_sentences": 3, "relation": "at least"}, "Yes!!!!"),
    (LENGTH + "number_words", {"num_words": 3, "relation": "at least"}, "a - - - -"),
    (LENGTH + "number_paragraphs", {"num_paragraphs": 3}, "One.\n***\n***\n"),
    (CONTENT + "number_placeholders", {"num_placeholders": 2}, "[] [ ]"),
    (CONTENT + "number_placeholders", {"num_placeholders": 2}, "[x] [x]"),
    (CONTENT + "postscript", {"postscript_marker": "P.S."}, "Hello.\nP.S."),
    (FORMAT + "number_bullet_lists", {"num_bullets": 2}, "*\n*\n"),
    (FORMAT + "constrained_response", {}, "My answer is yes. My answer is no."),
    (FORMAT + "number_highlighted_sections", {"num_highlights": 2}, "*x* *x*"),
    (FORMAT + "number_highlighted_sections", {"num_highlights": 2}, "** ** * *x"),
    (FORMAT + "multiple_sections", SECTIONS, "Section 1 Section 2"),
    (FORMAT + "json_format", {}, "{}"),
    (FORMAT + "json_format", {}, '"text"'),
    (FORMAT + "json_format", {}, "[" * 100_000 + "x"),
    (FORMAT + "title", {}, "<<>> text"),
    ("combination:two_responses", {}, "Same.\n******\nSame."),
    ("combination:two_responses", {}, "One.\n******"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "Say it."),
    ("startend:quotation", {}, '""'),
    (CASE + "english_capital", {}, "123"),
]


def row(identifier: str, given: dict[str, Any] | None, **changes: Any) -> Row:
    fields = {"instruction_id_list": [identifier], "kwargs": [given], **changes}
    return build_row("if_constraints", "?", **fields)


@pytest.mark.parametrize(("identifier", "given", "answer"), RIGHT)
def test_what_fulfills_the_constraint_earns_one(
    identifier: str, given: dict[str, Any], answer: str
):
    assert judge(IfConstraints(), row(identifier, given), answer) == 1


@pytest.mark.parametrize(("identifier", "given", "answer"), [*WRONG, *HACKS])
def test_what_breaks_it_earns_nothing(identifier: str, given: dict[str, Any], answer: str):
    assert judge(IfConstraints(), row(identifier, given), answer) == 0


def test_the_tables_cover_every_constraint():
    assert_enough(RIGHT, WRONG, HACKS)
    assert len(CONSTRAINTS) == 25
    for table in (RIGHT, WRONG):
        assert {case[0] for case in table} == CONSTRAINTS.keys()


def test_rows_are_good():
    assert_good_rows(IfConstraints())


def test_the_generator_reaches_every_constraint_and_never_contradicts_itself():
    found = set()
    families = [*FAMILIES, *((name,) for name in SEPARATELY)]
    assert {name for family in families for name in family} == MAKERS.keys()
    for level in (0, 2, 5):
        for each in IfConstraints().rows(150, 1, level):
            names = {identifier.split(":")[1] for identifier in each["instruction_id_list"]}
            found |= set(each["instruction_id_list"])
            assert all(len(names & set(family)) <= 1 for family in families)
            assert not any(pair <= names for pair in CONFLICTS)
            assert len(names) == 1 or not names & set(SEPARATELY)
    assert found == CONSTRAINTS.keys()


def test_a_fraction_is_the_share_of_fulfilled_constraints():
    names = ["punctuation:no_comma", "change_case:english_lowercase", "startend:quotation"]
    each = row("", None, instruction_id_list=names, kwargs=[None, {}, {}])
    assert judge(IfConstraints(), each, "all small") == 0
    assert judge(IfConstraints(), {**each, "grading_mode": "fraction"}, "all small") == 2 / 3
    assert judge(IfConstraints(), {**each, "grading_mode": "fraction"}, "") == 0
    assert judge(IfConstraints(), each, '"all small"') == 1


def test_the_same_constraint_twice_counts_twice():
    names, given = [KEY + "existence"] * 2, [{"keywords": ["sea"]}, {"keywords": ["sun"]}]
    each = row("", None, instruction_id_list=names, kwargs=given, grading_mode="fraction")
    assert judge(IfConstraints(), each, "The sun.") == 0.5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"instruction_id_list": ["paragraphs:paragraphs"]}, "'paragraphs:paragraphs'"),
        ({"instruction_id_list": [], "kwargs": []}, "instruction_id_list is empty"),
        ({"kwargs": []}, "kwargs does not have one entry"),
        ({"kwargs": [{}]}, "keywords:frequency: keyword = None; give a text"),
        ({"kwargs": [{**TWICE, "frequency": "2"}]}, "frequency = '2'; give a whole number"),
        ({"kwargs": [{**TWICE, "relation": "about"}]}, "relation = 'about'; give one of"),
        ({"grading_mode": "kind"}, "grading_mode = 'kind'"),
    ],
)
def test_a_row_that_cannot_be_judged_is_refused(changes: dict[str, Any], said: str):
    with pytest.raises(BadRow, match=said):
        IfConstraints().check({**row("keywords:frequency", TWICE), **changes})
