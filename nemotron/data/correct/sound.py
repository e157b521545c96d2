"""How a token sounds: Jyutping, Pinyin, IPA, or its letters; and how far two sounds are apart."""

import functools
import importlib.util
import sqlite3
from collections.abc import Callable
from pathlib import Path

from nemotron.data.correct.distance import count_edits
from nemotron.data.correct.grammar import pinyin_of
from nemotron.errors import UserError

Sound = Callable[[str], str]
"""Returns the sound of a text, as letters of an alphabet; the same text has the same sound."""
EXTRA = "pip install 'nemotron-train[correct]'"
KEPT = 1 << 20
"""Distances and sounds that are kept."""


def sound_of(language: str) -> Sound:
    """Return the sound of texts of a language, one of `LANGUAGES`.

    Raises:
        UserError: when the language is unknown, or a package for it is missing.
    """
    if language not in LANGUAGES:
        raise UserError(
            f"is unknown; use {', '.join(LANGUAGES)}.", key="--language", value=language
        )
    return functools.lru_cache(KEPT)(LANGUAGES[language]())


@functools.lru_cache(KEPT)
def distance(one: str, other: str) -> int:
    """Return the least number of letters to insert, remove or replace."""
    return count_edits(one, other)


def is_there(package: str) -> bool:
    """Say whether a package is installed."""
    return importlib.util.find_spec(package) is not None


def require(package: str, language: str) -> None:
    """Check that a package is installed.

    Raises:
        UserError: when it is not, with the command that installs it.
    """
    if not is_there(package):
        raise UserError(
            f"needs the package {package}; install it: {EXTRA}, or use the language grammar.",
            key="--language",
            value=language,
        )


def _letters() -> Sound:
    return str.lower


def _grammar() -> Sound:
    return pinyin_of


def _pinyin() -> Sound:
    require("pypinyin", "zh")
    import pypinyin

    def sound(text: str) -> str:
        return "".join(pypinyin.lazy_pinyin(text)).lower()

    return sound


def _jyutping() -> Sound:
    require("pycantonese", "yue")
    import pycantonese

    def sound(text: str) -> str:
        found = pycantonese.characters_to_jyutping(text)
        return "".join(jyutping or word for word, jyutping in found).lower()

    return sound


def _ipa() -> Sound:
    require("gruut_lang_en", "en")
    import gruut_lang_en

    path = Path(gruut_lang_en.__file__).parent / "lexicon.db"
    lexicon = sqlite3.connect(f"file:{path}?mode=ro", uri=True, check_same_thread=False)
    query = "SELECT phonemes FROM word_phonemes WHERE word = ? ORDER BY pron_order LIMIT 1"

    def sound(text: str) -> str:
        word = text.strip().lower()
        found = lexicon.execute(query, (word,)).fetchone()
        return word if found is None else found[0].replace(" ", "")

    return sound


LANGUAGES: dict[str, Callable[[], Sound]] = {
    "grammar": _grammar,
    "zh": _pinyin,
    "yue": _jyutping,
    "en": _ipa,
    "letters": _letters,
}
"""What gives the sound of each language; `grammar` and `letters` need no package."""
