"""How much a text switches between languages, from the language of each word.

Source: Guzmán et al. 2017, "Metrics for Modeling Code-Switching Across Corpora" (Interspeech);
agoel00/cs_metrics.
"""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

UNIVERSAL = "univ"
"""The language of punctuation and numbers, which measures leave out."""


@dataclass(frozen=True)
class Measures:
    """Measures of one text."""

    cmi: float
    """Code-mixing index: percentage of words that are not of the commonest language."""
    m_index: float
    """How evenly languages share the words: 0 for one language, 1 for equal shares."""
    i_index: float
    """Share of the places between words at which the language changes."""
    entropy: float
    """Of the languages, in bits a word."""
    burstiness: float | None
    """Of the lengths of stretches of one language: -1 for equal ones, towards 1 for very different
    ones. None for fewer than two stretches."""
    switches: int


def measure(languages: Sequence[str]) -> Measures:
    """Return the measures of a text with these languages of its words."""
    words = [language for language in languages if language != UNIVERSAL]
    counts = Counter(words)
    if not words:
        return Measures(0.0, 0.0, 0.0, 0.0, None, 0)
    shares = [count / len(words) for count in counts.values()]
    squares = sum(share * share for share in shares)
    switches = sum(one != other for one, other in pairwise(words))
    return Measures(
        cmi=100 * (1 - max(shares)),
        m_index=(1 - squares) / ((len(counts) - 1) * squares) if len(counts) > 1 else 0.0,
        i_index=switches / (len(words) - 1) if len(words) > 1 else 0.0,
        entropy=-sum(share * math.log2(share) for share in shares),
        burstiness=_burstiness([len(list(group)) for _, group in groupby(words)]),
        switches=switches,
    )


def _burstiness(lengths: Sequence[int]) -> float | None:
    if len(lengths) < 2:
        return None
    mean, deviation = statistics.mean(lengths), statistics.stdev(lengths)
    return (deviation - mean) / (deviation + mean)
