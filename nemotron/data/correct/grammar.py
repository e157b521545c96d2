"""A small language in Chinese characters, made up so that tests and examples need no package.

It has 360 words, each with 30 words that often follow it. It is not Mandarin: figures on it say
nothing about corpora of speech. `grammar.txt` holds the words of two characters, those of one, and
the Pinyin of each character without tones.
"""

import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SEED = 20109
"""Decides which words follow which; another one would be another language."""
NUM_SUCCESSORS = 30
FOLLOWS = 0.7
"""Probability that a word is one of the successors of the word before it."""
SHORTEST, LONGEST = 5, 8
"""Words in a sentence."""


@dataclass(frozen=True)
class Grammar:
    """The words, what may follow each, and how each character sounds."""

    words: tuple[str, ...]
    successors: tuple[tuple[int, ...], ...]
    pinyin: dict[str, str]


@functools.cache
def grammar() -> Grammar:
    """Return the language, read from its table."""
    table = Path(__file__).with_name("grammar.txt").read_text(encoding="utf-8")
    pairs, singles, sounds = (part.split() for part in table.split("\n\n"))
    words = (*pairs, *singles)
    pinyin = {c: sound for group in sounds for sound, cs in [group.split(":")] for c in cs}
    rng = random.Random(SEED)
    successors = tuple(tuple(below(rng, len(words)) for _ in range(NUM_SUCCESSORS)) for _ in words)
    return Grammar(words, successors, pinyin)


def sentences(seed: int) -> Iterator[list[str]]:
    """Yield sentences as lists of words, without end; the same ones for the same seed."""
    rng, language = random.Random(f"sentences {seed}"), grammar()
    while True:
        length = SHORTEST + below(rng, LONGEST - SHORTEST + 1)
        numbers = [below(rng, len(language.words))]
        while len(numbers) < length:
            following = language.successors[numbers[-1]]
            if rng.random() < FOLLOWS:
                numbers.append(following[below(rng, len(following))])
            else:
                numbers.append(below(rng, len(language.words)))
        yield [language.words[number] for number in numbers]


def pinyin_of(text: str) -> str:
    """Return the Pinyin of the characters; of one that the language lacks, itself."""
    table = grammar().pinyin
    return "".join(table.get(character, character.lower()) for character in text)


def below(rng: random.Random, size: int) -> int:
    """Draw a number below `size`, the same in every version of Python."""
    return int(rng.random() * size)
