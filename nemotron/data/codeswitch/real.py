"""Real text that switches between languages: what speakers of Cantonese said."""

import re
from collections.abc import Iterator

from nemotron.data.codeswitch.measures import UNIVERSAL
from nemotron.data.codeswitch.switch import Switched
from nemotron.data.codeswitch.words import is_of_language
from nemotron.data.correct.mixed import is_character

HKCANCOR = "hkcancor"
LATIN = re.compile("[A-Za-z]")
PUNCTUATION = {",": "，", ".": "。", "?": "？", "!": "！"}
"""Marks of the corpus, and those of written Cantonese."""


def has_latin(text: str) -> bool:
    """Say whether a text has a Latin letter."""
    return LATIN.search(text) is not None


def real_sentences() -> Iterator[Switched]:
    """Yield the utterances of HKCanCor (CC BY) with Cantonese and English words.

    Source: Luke and Wong 2015, "The Hong Kong Cantonese Corpus: Design and Uses"; it comes with
    the package pycantonese.
    """
    import pycantonese

    for utterance in pycantonese.hkcancor().utterances():
        marks = (token.word for token in utterance.tokens if token.word != "-")
        words = [part for word in marks for part in PUNCTUATION.get(word, word).split("_") if part]
        found = Switched(tuple(words), tuple(map(_language, words)))
        if found.measures.switches:
            yield found


def _language(word: str) -> str:
    if not is_of_language(word):
        return UNIVERSAL
    return "yue" if any(map(is_character, word)) else "en"
