"""Write text in two languages that share an alphabet, and text that switches between them.

    python tools/two_languages.py --out data/languages

The languages are the verse of the package in lower case, and other poems of it whose letters are
permuted: which language a letter is of can only be known from its context. Three texts of JSON
lines are written, a.jsonl, b.jsonl and both.jsonl, for recipes/correct/languages.yaml.
"""

import argparse
import json
import random
import string
from pathlib import Path

from nemotron.data.corpus import load_documents

PART = 240
"""Characters of a text, as many as a row of the recipe has."""
STRETCH = 40
"""Characters, about, after which a text of both languages switches."""
SWITCHING = 0.3
"""Share of the texts that switch."""


def permuted(text: str) -> str:
    """Return the text in the second language."""
    letters = list(string.ascii_lowercase)
    random.Random(7).shuffle(letters)
    return text.translate(str.maketrans(string.ascii_lowercase, "".join(letters)))


def parts() -> list[str]:
    """Return the verse in pieces, in lower case and with plain letters only."""
    allowed = set(string.ascii_lowercase + " \n.,;'-!?")
    found = []
    for document in load_documents("verse"):
        text = "".join(c for c in document.lower() if c in allowed)
        found += [text[i : i + PART] for i in range(0, len(text) - PART, PART)]
    random.Random(1).shuffle(found)
    return found


def switching(first: str, second: str, rng: random.Random) -> tuple[str, list[tuple[int, int]]]:
    """Return a text that takes turns between both, at spaces.

    The second result has of each turn where it begins, and 0 or 1 for the language.
    """
    words = [first.split(" "), permuted(second).split(" ")]
    found: list[str] = []
    turns: list[tuple[int, int]] = []
    side = rng.randrange(2)
    while all(words) and sum(map(len, found)) + len(found) < PART:
        length = rng.randint(STRETCH // 2, 3 * STRETCH // 2)
        turns.append((sum(map(len, found)) + len(found), side))
        taken = 0
        while words[side] and taken < length:
            found.append(words[side].pop(0))
            taken += len(found[-1]) + 1
        side = 1 - side
    return " ".join(found)[:PART], turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    pieces, rng = parts(), random.Random(2)
    number = int(len(pieces) * SWITCHING / (1 + SWITCHING))
    pairs, rest = pieces[: 2 * number], pieces[2 * number :]
    texts = {
        "a": rest[::2],
        "b": [permuted(text) for text in rest[1::2]],
        "both": [
            switching(one, other, rng)[0]
            for one, other in zip(pairs[::2], pairs[1::2], strict=True)
        ],
    }
    for name, own in texts.items():
        lines = [json.dumps({"text": text}) + "\n" for text in own]
        (out / f"{name}.jsonl").write_text("".join(lines))
        print(f"{len(lines):,} texts in {out / name}.jsonl")


if __name__ == "__main__":
    main()
