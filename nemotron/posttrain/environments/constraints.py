"""Checks of a text's form: 24 of IFEval's kinds of instruction under their ids, and one more.

Source: Zhou et al. 2023, "Instruction-Following Evaluation for Large Language Models". Checks are
plain Python; where IFEval asks a tokenizer for sentences or words, a regular expression does it.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Check = Callable[[str, dict[str, Any]], bool]


@dataclass(frozen=True)
class Constraint:
    """One kind of constraint."""

    check: Check
    """Whether a text, which is not empty, fulfills the constraint with these arguments."""
    arguments: dict[str, type]
    """Names and types of the arguments that the check reads."""


WORD = re.compile(r"\w+(?:['’-]\w+)*")
COMPARE: dict[str, Callable[[int, int], bool]] = {
    "at least": lambda found, wanted: found >= wanted,
    "less than": lambda found, wanted: found < wanted,
    "at most": lambda found, wanted: found <= wanted,
    "exactly": lambda found, wanted: found == wanted,
}
"""IFEval knows the first two."""
ENDINGS = re.compile(r"[.!?]+(?=[\s\"')\]*]|$)")
ABBREVIATIONS = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|e\.g|i\.e|etc|vs)\.")
CHOICES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def words(text: str) -> list[str]:
    """Return the words, with inner apostrophes and hyphens."""
    return WORD.findall(text)


def _compares(found: int, given: dict[str, Any], relation: str, number: str) -> bool:
    return COMPARE[given[relation]](found, given[number])


def _count_word(text: str, word: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def _existence(text: str, given: dict[str, Any]) -> bool:
    return all(_count_word(text, word) for word in given["keywords"])


def _frequency(text: str, given: dict[str, Any]) -> bool:
    return _compares(_count_word(text, given["keyword"]), given, "relation", "frequency")


def _forbidden(text: str, given: dict[str, Any]) -> bool:
    return not any(_count_word(text, word) for word in given["forbidden_words"])


def _letters(text: str, given: dict[str, Any]) -> bool:
    found = text.lower().count(given["letter"].lower())
    return _compares(found, given, "let_relation", "let_frequency")


def _sentences(text: str, given: dict[str, Any]) -> bool:
    plain = ABBREVIATIONS.sub("x", text)
    ended = [part for part in ENDINGS.split(plain) if words(part)]
    return _compares(len(ended), given, "relation", "num_sentences")


def _number_of_words(text: str, given: dict[str, Any]) -> bool:
    return _compares(len(words(text)), given, "relation", "num_words")


def _paragraphs(text: str, given: dict[str, Any]) -> bool:
    """Paragraphs are separated by ***, and none is empty."""
    found = [part.strip() for part in text.strip().split("***")]
    return all(found) and len(found) == given["num_paragraphs"]


def _nth_paragraph(text: str, given: dict[str, Any]) -> bool:
    """Paragraphs are separated by an empty line; one begins with a given word."""
    found = [part for part in re.split(r"\n\s*\n", text.strip()) if part.strip()]
    if len(found) != given["num_paragraphs"] or not 1 <= given["nth_paragraph"] <= len(found):
        return False
    first = words(found[given["nth_paragraph"] - 1])[:1]
    return [word.lower() for word in first] == [given["first_word"].lower()]


def _lines(text: str, given: dict[str, Any]) -> bool:
    found = [line for line in text.splitlines() if line.strip()]
    return _compares(len(found), given, "relation", "num_lines")


def _placeholders(text: str, given: dict[str, Any]) -> bool:
    found = set(re.findall(r"\[[^\[\]\n]*\w[^\[\]\n]*\]", text))
    return len(found) >= given["num_placeholders"]


def _postscript(text: str, given: dict[str, Any]) -> bool:
    marker = re.escape(given["postscript_marker"])
    return re.search(rf"(?m)^\s*{marker}[ \t]*\S.*\s*\Z", text) is not None


def _bullets(text: str, given: dict[str, Any]) -> bool:
    return len(re.findall(r"(?m)^\s*[*-][ \t]+\S", text)) == given["num_bullets"]


def _choice(text: str, given: dict[str, Any]) -> bool:
    return text.strip() in CHOICES


def _highlights(text: str, given: dict[str, Any]) -> bool:
    found = re.findall(r"(?<!\*)(\*{1,2})([^*\n]*\w[^*\n]*)\1(?!\*)", text)
    return len({content.strip() for _, content in found}) >= given["num_highlights"]


def _sections(text: str, given: dict[str, Any]) -> bool:
    """Each section has its heading, with a number, and a content."""
    heading = rf"(?m)^\s*{re.escape(given['section_spliter'])}\s+\d+\b[:.]?"
    parts = re.split(heading, text)[1:]
    return len(parts) >= given["num_sections"] and all(words(part) for part in parts)


def _json(text: str, given: dict[str, Any]) -> bool:
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)\n\s*```\s*", text, re.DOTALL | re.IGNORECASE)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict | list) and bool(value)


def _title(text: str, given: dict[str, Any]) -> bool:
    return re.search(r"<<[^<>\n]*\w[^<>\n]*>>", text) is not None


def _two_responses(text: str, given: dict[str, Any]) -> bool:
    parts = [part.strip() for part in text.split("******")]
    return len(parts) == 2 and all(map(words, parts)) and parts[0] != parts[1]


def _repeat(text: str, given: dict[str, Any]) -> bool:
    start, prompt = text.strip().lower(), given["prompt_to_repeat"].strip().lower()
    return start.startswith(prompt) and bool(words(start[len(prompt) :]))


def _end(text: str, given: dict[str, Any]) -> bool:
    return text.strip().strip('"').lower().endswith(given["end_phrase"].strip().lower())


def _quotation(text: str, given: dict[str, Any]) -> bool:
    stripped = text.strip()
    wrapped = len(stripped) > 2 and stripped[0] == '"' == stripped[-1]
    return wrapped and bool(words(stripped[1:-1]))


def _capital_words(text: str, given: dict[str, Any]) -> bool:
    found = sum(word.isupper() for word in words(text))
    return _compares(found, given, "capital_relation", "capital_frequency")


def _capital(text: str, given: dict[str, Any]) -> bool:
    return text.isupper()


def _lowercase(text: str, given: dict[str, Any]) -> bool:
    return text.islower()


def _no_comma(text: str, given: dict[str, Any]) -> bool:
    return not any(comma in text for comma in ",\uff0c\u060c\u3001") and bool(words(text))


CONSTRAINTS: dict[str, Constraint] = {
    "keywords:existence": Constraint(_existence, {"keywords": list}),
    "keywords:frequency": Constraint(
        _frequency, {"keyword": str, "frequency": int, "relation": str}
    ),
    "keywords:forbidden_words": Constraint(_forbidden, {"forbidden_words": list}),
    "keywords:letter_frequency": Constraint(
        _letters, {"letter": str, "let_frequency": int, "let_relation": str}
    ),
    "length_constraints:number_sentences": Constraint(
        _sentences, {"num_sentences": int, "relation": str}
    ),
    "length_constraints:number_words": Constraint(
        _number_of_words, {"num_words": int, "relation": str}
    ),
    "length_constraints:number_paragraphs": Constraint(_paragraphs, {"num_paragraphs": int}),
    "length_constraints:nth_paragraph_first_word": Constraint(
        _nth_paragraph, {"num_paragraphs": int, "nth_paragraph": int, "first_word": str}
    ),
    "length_constraints:number_lines": Constraint(_lines, {"num_lines": int, "relation": str}),
    "detectable_content:number_placeholders": Constraint(_placeholders, {"num_placeholders": int}),
    "detectable_content:postscript": Constraint(_postscript, {"postscript_marker": str}),
    "detectable_format:number_bullet_lists": Constraint(_bullets, {"num_bullets": int}),
    "detectable_format:constrained_response": Constraint(_choice, {}),
    "detectable_format:number_highlighted_sections": Constraint(
        _highlights, {"num_highlights": int}
    ),
    "detectable_format:multiple_sections": Constraint(
        _sections, {"section_spliter": str, "num_sections": int}
    ),
    "detectable_format:json_format": Constraint(_json, {}),
    "detectable_format:title": Constraint(_title, {}),
    "combination:two_responses": Constraint(_two_responses, {}),
    "combination:repeat_prompt": Constraint(_repeat, {"prompt_to_repeat": str}),
    "startend:end_checker": Constraint(_end, {"end_phrase": str}),
    "startend:quotation": Constraint(_quotation, {}),
    "change_case:capital_word_frequency": Constraint(
        _capital_words, {"capital_frequency": int, "capital_relation": str}
    ),
    "change_case:english_capital": Constraint(_capital, {}),
    "change_case:english_lowercase": Constraint(_lowercase, {}),
    "punctuation:no_comma": Constraint(_no_comma, {}),
}
