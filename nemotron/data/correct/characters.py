"""A tokenizer whose tokens are single characters, as correction of Chinese text needs."""

from collections import Counter
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from nemotron.data.bpe import SPECIALS
from nemotron.data.correct.marks import FREE, NAMES

UNKNOWN = "<unk>"
MARKED = {name: mark for mark, name in FREE.items()}
CHARACTER_SPECIALS = tuple(NAMES[MARKED[name]] if name in MARKED else name for name in SPECIALS)
"""The special tokens of Nemotron 3 at their ids; those of text correction have their own names."""


def count_characters(texts: Iterable[str]) -> Counter[str]:
    """Count the characters of texts."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    return counts


def character_tokenizer(
    counts: Counter[str], most: int | None = None, more_specials: Sequence[str] = ()
) -> str:
    """Return the `tokenizer.json` of a tokenizer that has the most frequent characters.

    The ids begin with the special tokens; characters follow, the most frequent first and equals in
    the order of Unicode. `most` limits the number of ids. Every other character is `<unk>`.
    """
    specials = [*CHARACTER_SPECIALS, *more_specials]
    ordered = sorted(counts, key=lambda character: (-counts[character], character))
    kept = ordered[: None if most is None else most - len(specials)]
    vocabulary = {token: index for index, token in enumerate([*specials, *kept])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in specials]
    )
    return tokenizer.to_str(pretty=False)
