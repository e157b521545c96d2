"""The language of a token by the script of its letters, where each language has its own."""

import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nemotron.data.tokenizer import Tokenizer

NONE = -1
"""Number of a token whose letters, if it has any, are of no language or of several."""
HAN, LATIN, CYRILLIC = ("CJK",), ("LATIN",), ("CYRILLIC",)
ARABIC, DEVANAGARI = ("ARABIC",), ("DEVANAGARI",)
SCRIPTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("zh", "yue"), HAN),
    "ja": ("CJK", "HIRAGANA", "KATAKANA"),
    "ko": ("HANGUL",),
    **dict.fromkeys(("en", "es", "fr", "de", "it", "pt", "nl", "pl", "tr", "vi", "id"), LATIN),
    **dict.fromkeys(("ru", "uk", "bg"), CYRILLIC),
    **dict.fromkeys(("ar", "fa", "ur"), ARABIC),
    **dict.fromkeys(("hi", "mr", "ne"), DEVANAGARI),
    "el": ("GREEK",),
    "he": ("HEBREW",),
    "th": ("THAI",),
    "ta": ("TAMIL",),
    "bn": ("BENGALI",),
    "ka": ("GEORGIAN",),
    "hy": ("ARMENIAN",),
}
"""Scripts of languages, as the names of their letters in Unicode begin."""


def shared(one: str, other: str) -> tuple[str, ...]:
    """Return the scripts that two languages have in common."""
    return tuple(script for script in SCRIPTS[one] if script in SCRIPTS[other])


def languages_by_script(tokenizer: Tokenizer, languages: Sequence[str]) -> NDArray[np.int64]:
    """Return the number of the language of each id, by the letters of its text alone.

    Source: kaihuhuang/Language-Group: wenet/transformer/asr_model.py, which has ranges of the
    vocabulary.
    """
    found = np.full(tokenizer.vocab_size, NONE, np.int64)
    owner = {script: number for number, name in enumerate(languages) for script in SCRIPTS[name]}
    for token in range(tokenizer.vocab_size):
        if token in tokenizer.special_ids:
            continue
        text = unicodedata.normalize("NFKC", tokenizer.decode([token]))
        names = (unicodedata.name(letter, "").split(" ")[0] for letter in text if letter.isalpha())
        numbers = {owner.get(name, NONE) for name in names}
        if len(numbers) == 1:
            found[token] = numbers.pop()
    return found
