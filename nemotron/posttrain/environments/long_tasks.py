"""Long texts in which something is to be found: needles, chains of variables, frequent words.

Tasks follow RULER (Hsieh et al. 2024, "RULER: What's the Real Context Size of Your Long-Context
Language Models?"); texts are generated, so scores are not comparable with published ones.
"""

import random
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from nemotron.posttrain.environments.words import CITIES, FIRST_NAMES, ITEMS, NOUNS

LETTERS = string.ascii_lowercase


@dataclass(frozen=True)
class LongTask:
    """Sentences to hide in a long text, a question, and what its answer contains."""

    kind: str
    hidden: list[str]
    """Sentences that occur once each, spread over the text in this order."""
    question: str
    expected: list[str]
    distractors: list[str]
    """What a right answer does not contain."""
    filler: tuple[str, ...] = ()
    """Sentences of which the rest of the text is made, in turn."""
    words: dict[str, float] = field(default_factory=dict)
    """Instead of sentences: words of the text and how often each occurs in every part of it; of a
    fraction the whole part."""
    least: int = 1
    """Parts of the text at least, for the words asked for to be the most frequent ones."""
    answering: frozenset[str] = frozenset()
    """Those of `hidden` that a chosen depth moves: needles that the answer needs."""
    per_document: int = 0
    """Sentences of each numbered document that the text consists of; 0: it is one text."""


FILLER = tuple(
    f"{who} {did} the {noun} {where}."
    for who, did, noun, where in zip(
        FIRST_NAMES[:22],
        ("saw", "painted", "carried", "cleaned", "found", "bought", "repaired") * 4,
        NOUNS[::3],
        (f"in {city}" for city in CITIES),
        strict=False,
    )
)


def single(rng: random.Random, level: int) -> LongTask:
    """Return one needle without others."""
    return _needles(rng, "needle_single", keys=1, values=1, asked=1)


def multi_key(rng: random.Random, level: int) -> LongTask:
    """Return one needle among others with other keys."""
    return _needles(rng, "needle_multikey", keys=3 + 2 * level, values=1, asked=1)


def multi_value(rng: random.Random, level: int) -> LongTask:
    """Return several needles with the same key, among others."""
    return _needles(rng, "needle_multivalue", keys=2 + level, values=2 + level // 2, asked=1)


def multi_query(rng: random.Random, level: int) -> LongTask:
    """Return several needles that are all asked for, among others."""
    return _needles(rng, "needle_multiquery", keys=4 + level, values=1, asked=2 + level // 2)


def variables(rng: random.Random, level: int) -> LongTask:
    """Return chains of assignments, and ask which variables have one of the values."""
    hops = 2 + level // 2
    names = _distinct(
        rng, 2 * (hops + 1), lambda: "".join(rng.choices(string.ascii_uppercase, k=5))
    )
    chains = [names[: hops + 1], names[hops + 1 :]]
    values = _numbers(rng, 2)
    steps = []
    for chain, value in zip(chains, values, strict=True):
        texts = [f"VAR {chain[0]} = {value}."]
        texts += [f"VAR {b} = VAR {a}." for a, b in pairwise(chain)]
        steps.append(texts)
    question = f"Which variables have the value {values[0]}? List all {hops + 1} names."
    hidden = [text for pair in zip(*steps, strict=True) for text in pair]
    return LongTask("variable_tracking", hidden, question, chains[0], chains[1], FILLER)


def common_words(rng: random.Random, level: int) -> LongTask:
    """Return words of which a few occur more often than all others."""
    count = 2 + min(level, 5)
    chosen = rng.sample(NOUNS, 12 + 4 * min(level, 8))
    often = dict.fromkeys(chosen[:count], 4.0) | dict.fromkeys(chosen[count:], 1.0)
    question = f"Which {count} words occur most often in the list? List them."
    return LongTask("common_words", [], question, chosen[:count], chosen[count:], words=often)


def frequent_words(rng: random.Random, level: int) -> LongTask:
    """Return coined words whose frequencies fall with the square of their rank (zeta, 2.0).

    The most frequent one is noise that is not asked for, as in RULER.
    """
    coined = _distinct(rng, 15 + 5 * min(level, 8), lambda: "".join(rng.choices(LETTERS, k=6)))
    often = {"...": 1.0} | {word: rank**-2.0 for rank, word in enumerate(coined, 2)}
    question = (
        "Do not count the dots. Which three coded words occur most often in the text? List them."
    )
    # from 50 parts on, rank 4 occurs more often than rank 5
    return LongTask("frequent_words", [], question, coined[:3], coined[3:], words=often, least=50)


def hops(rng: random.Random, level: int) -> LongTask:
    """Return documents with facts of which each leads to the next, among others of that form."""
    length = 2 + min(level, 3)
    people = rng.sample(FIRST_NAMES, 2 * length)
    cities, items = rng.sample(CITIES, 2), rng.sample(ITEMS, 2)
    first, other = people[:length], people[length:]
    hidden = []
    for chain, city, item in zip((first, other), cities, items, strict=True):
        hidden += [f"The key of {a} is with {b}." for a, b in pairwise(chain)]
        hidden += [f"{chain[-1]} left all keys in {city} under the {item}."]
    rng.shuffle(hidden)
    question = f"In which city is the key of {first[0]} in the end, and under which thing?"
    filler = tuple(
        f"The {noun} of the {item} is new." for noun, item in zip(NOUNS, ITEMS * 3, strict=False)
    )
    return LongTask(
        "multi_hop",
        hidden,
        question,
        [cities[0], items[0]],
        [cities[1], items[1]],
        filler,
        per_document=4,
    )


def _needles(rng: random.Random, kind: str, keys: int, values: int, asked: int) -> LongTask:
    """Return sentences that give numbers for words, and a question for some of the words."""
    words, numbers = rng.sample(NOUNS, keys), _numbers(rng, keys * values)
    pairs = [(words[place % keys], number) for place, number in enumerate(numbers)]
    hidden = [f"The secret number of {word} is {number}." for word, number in pairs]
    wanted = words[:asked]
    expected = [number for word, number in pairs if word in wanted]
    others = [number for word, number in pairs if word not in wanted]
    rng.shuffle(hidden)
    plural = "s" if len(expected) > 1 else ""
    question = f"Which secret number{plural} of {' and '.join(wanted)} does the text give?"
    needed = frozenset(text for text in hidden if any(number in text for number in expected))
    return LongTask(kind, hidden, question, expected, others, FILLER, answering=needed)


def _numbers(rng: random.Random, count: int) -> list[str]:
    return _distinct(rng, count, lambda: str(rng.randint(1_000_000, 9_999_999)))


def _distinct(rng: random.Random, count: int, draw: Callable[[], str]) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


KINDS: dict[str, Callable[[random.Random, int], LongTask]] = {
    "needle_single": single,
    "needle_multikey": multi_key,
    "needle_multivalue": multi_value,
    "needle_multiquery": multi_query,
    "variable_tracking": variables,
    "common_words": common_words,
    "frequent_words": frequent_words,
    "multi_hop": hops,
}
"""The tasks by the name that their rows bear as `kind`."""
NEEDLES = tuple(kind for kind in KINDS if kind.startswith("needle"))
"""Those whose answer can be put at a depth."""
