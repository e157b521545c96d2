"""Composes instructions that can all be followed at once, with the arguments of their checks."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nemotron.posttrain.environments.words import CITIES, ITEMS, NOUNS

Make = Callable[[random.Random, list[str]], tuple[dict[str, Any], str]]


@dataclass(frozen=True)
class Instruction:
    """One constraint and the sentence that asks for it."""

    identifier: str
    arguments: dict[str, Any]
    sentence: str


SUBJECTS = tuple(f"Write about {'an' if item[0] in 'aeiou' else 'a'} {item}." for item in ITEMS)
SUBJECTS += tuple(f"Describe a day in {city}." for city in CITIES)
SEPARATELY = ("constrained_response", "json_format", "repeat_prompt")
"""Kinds that fix the whole answer, and so come alone."""
FAMILIES: tuple[tuple[str, ...], ...] = (
    ("existence",),
    ("frequency",),
    ("forbidden_words",),
    ("letter_frequency",),
    ("number_sentences",),
    ("number_words",),
    (
        "number_paragraphs",
        "nth_paragraph_first_word",
        "number_lines",
        "number_bullet_lists",
        "multiple_sections",
        "two_responses",
    ),
    ("number_placeholders",),
    ("number_highlighted_sections",),
    ("title",),
    ("end_checker", "quotation", "postscript"),
    ("capital_word_frequency", "english_capital", "english_lowercase"),
    ("no_comma",),
)
"""Of each family, at most one kind is asked for at once."""
CONFLICTS = (
    {"postscript", "english_lowercase"},
    {"postscript", "english_capital"},
    {"multiple_sections", "english_lowercase"},
    {"multiple_sections", "english_capital"},
    {"multiple_sections", "end_checker"},
)
"""Pairs of different families that cannot both be followed, or hardly."""


def compose(rng: random.Random, subject: str, count: int) -> list[Instruction]:
    """Return so many instructions that do not contradict each other."""
    if count == 1 and rng.random() < 0.12:
        names = [rng.choice(SEPARATELY)]
    else:
        families = rng.sample(FAMILIES, min(count, len(FAMILIES)))
        names = [rng.choice(family) for family in families]
    while pairs := [pair for pair in CONFLICTS if pair <= set(names)]:
        names.remove(min(pairs[0]))
    # each takes words from the end, so that no word is both wanted and forbidden
    words = rng.sample(NOUNS, len(NOUNS))
    made = []
    for name in names:
        group, make = MAKERS[name]
        arguments, sentence = make(rng, words)
        if name == "repeat_prompt":
            arguments = {"prompt_to_repeat": subject}
        made.append(Instruction(f"{group}:{name}", arguments, sentence))
    return made


def _existence(rng: random.Random, words: list[str]) -> tuple[dict[str, Any], str]:
    chosen = [words.pop() for _ in range(rng.randint(1, 3))]
    return {"keywords": chosen}, f"Use the words {', '.join(chosen)}."


def _frequency(rng: random.Random, words: list[str]) -> tuple[dict[str, Any], str]:
    word, number = words.pop(), rng.randint(2, 3)
    relation = rng.choice(("at least", "less than"))
    arguments = {"keyword": word, "frequency": number, "relation": relation}
    return arguments, f"Use the word {word} {relation} {number} times."


def _forbidden(rng: random.Random, words: list[str]) -> tuple[dict[str, Any], str]:
    chosen = [words.pop() for _ in range(rng.randint(2, 4))]
    return {"forbidden_words": chosen}, f"Do not use the words {', '.join(chosen)}."


def _letters(rng: random.Random, words: list[str]) -> tuple[dict[str, Any], str]:
    letter, number = rng.choice("abdefghilmnoprstuw"), rng.randint(2, 8)
    arguments = {"letter": letter, "let_frequency": number, "let_relation": "at least"}
    return arguments, f"Use the letter {letter} at least {number} times."


def _sentences(rng: random.Random, words: list[str]) -> tuple[dict[str, Any], str]:
    relation = rng.choice(("at least", "less than"))
    number = rng.randint(2, 4) + 3 * (relation == "less than")
    arguments = {"num_sentences": number, "relation": relation}
    return arguments, f"Write {relation} {number} sentences."


def _words(rng: random.Random, words: list[str]) -> tuple[dict[str, Any], str]:
    relation = rng.choice(("at least", "less than"))
    number = rng.choice((20, 30, 50)) + 60 * (relation == "less than")
    return {"num_words": number, "relation": relation}, f"Use {relation} {number} words."


def _paragraphs(rng: random.Random, words: list[str]) -> tuple[dict[str, Any], str]:
    number = rng.randint(2, 4)
    sentence = f"Write {number} paragraphs, separated by ***."
    return {"num_paragraphs": number}, sentence


def _nth_paragraph(rng: random.Random, words: list[str]) -> tuple[dict[str, Any], str]:
    number, word = rng.randint(2, 3), words.pop()
    place = rng.randint(1, number)
    arguments = {"num_paragraphs": number, "nth_paragraph": place, "first_word": word}
    separated = f"Write {number} paragraphs, separated by an empty line."
    return arguments, f"{separated} Paragraph {place} must begin with the word {word}."


def _lines(rng: random.Random, words: list[str]) -> tuple[dict[str, Any], str]:
    number = rng.randint(3, 6)
    return {"num_lines": number, "relation": "exactly"}, f"Write exactly {number} lines."


def _placeholders(rng: random.Random, words: list[str]) -> tuple[dict[str, Any], str]:
    number = rng.randint(1, 3)
    sentence = f"Include at least {number} different placeholders in brackets, such as [name]."
    return {"num_placeholders": number}, sentence


def _postscript(rng: random.Random, words: list[str]) -> tuple[dict[str, Any], str]:
    marker = rng.choice(("P.S.", "P.P.S"))
    return {"postscript_marker": marker}, f"End with a postscript that begins with {marker}"


def _bullets(rng: random.Random, words: list[str]) -> tuple[dict[str, Any], str]:
    number = rng.randint(2, 5)
    sentence = f"Write exactly {number} bullet points, such as: * this is a point."
    return {"num_bullets": number}, sentence


def _highlights(rng: random.Random, words: list[str]) -> tuple[dict[str, Any], str]:
    number = rng.randint(1, 3)
    sentence = f"Highlight at least {number} different parts, such as *this part*."
    return {"num_highlights": number}, sentence


def _sections(rng: random.Random, words: list[str]) -> tuple[dict[str, Any], str]:
    number, name = rng.randint(2, 3), rng.choice(("Section", "Part"))
    sentence = f"Write {number} sections, and begin each with its heading, such as {name} 1."
    return {"section_spliter": name, "num_sections": number}, sentence


def _end(rng: random.Random, words: list[str]) -> tuple[dict[str, Any], str]:
    phrase = rng.choice(("That is all you need to know.", "Any other questions?", "Good night."))
    return {"end_phrase": phrase}, f"End with this phrase, and nothing after it: {phrase}"


def _capital_words(rng: random.Random, words: list[str]) -> tuple[dict[str, Any], str]:
    number = rng.randint(1, 3)
    arguments = {"capital_frequency": number, "capital_relation": "at least"}
    return arguments, f"Write at least {number} words in capital letters only."


def _plain(sentence: str) -> Make:
    """Return a maker of an instruction without arguments."""
    return lambda rng, words: ({}, sentence)


MAKERS: dict[str, tuple[str, Make]] = {
    "existence": ("keywords", _existence),
    "frequency": ("keywords", _frequency),
    "forbidden_words": ("keywords", _forbidden),
    "letter_frequency": ("keywords", _letters),
    "number_sentences": ("length_constraints", _sentences),
    "number_words": ("length_constraints", _words),
    "number_paragraphs": ("length_constraints", _paragraphs),
    "nth_paragraph_first_word": ("length_constraints", _nth_paragraph),
    "number_lines": ("length_constraints", _lines),
    "number_placeholders": ("detectable_content", _placeholders),
    "postscript": ("detectable_content", _postscript),
    "number_bullet_lists": ("detectable_format", _bullets),
    "constrained_response": (
        "detectable_format",
        _plain("Answer with one of: My answer is yes. / My answer is no. / My answer is maybe."),
    ),
    "number_highlighted_sections": ("detectable_format", _highlights),
    "multiple_sections": ("detectable_format", _sections),
    "json_format": ("detectable_format", _plain("Write the whole answer as a JSON object.")),
    "title": ("detectable_format", _plain("Give a title in double angular brackets: <<title>>.")),
    "two_responses": (
        "combination",
        _plain("Give two different answers, separated by six asterisks: ******"),
    ),
    "repeat_prompt": (
        "combination",
        _plain("First repeat the request above word for word, then answer it."),
    ),
    "end_checker": ("startend", _end),
    "quotation": ("startend", _plain("Put the whole answer between double quotation marks.")),
    "capital_word_frequency": ("change_case", _capital_words),
    "english_capital": ("change_case", _plain("Write in capital letters only.")),
    "english_lowercase": ("change_case", _plain("Write in small letters only.")),
    "no_comma": ("punctuation", _plain("Do not use commas.")),
}
