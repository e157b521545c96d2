"""The language of a token by the script of its letters, where each language has its own."""

import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nemotron.data.alphabets import SCRIPTS
from nemotron.data.tokenizer import Tokenizer

NONE = -1
"""Number of a token whose letters, if it has any, are of no language or of several."""


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
