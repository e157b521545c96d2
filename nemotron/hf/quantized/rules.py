"""Which layers a declaration names: exactly, by a pattern, or as all that are left."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import translate

from nemotron.precision.scales import StoredFormat

WORD = r"(?:[\w\-]|\\\.|\\d\+|\\w\+|\.\*|\.)"
SIMPLE = re.compile(rf"\^?(?:{WORD}|\((?:\?:)?{WORD}+(?:\|{WORD}+)*\))*\$?")
"""Regular expressions whose matching takes little time whatever the name: no nested repetition."""
MOST_REPETITIONS = 4
LONGEST_PATTERN = 10_000


@dataclass(frozen=True)
class Names:
    """A set of layers: names, and patterns of names."""

    exact: frozenset[str] = frozenset()
    patterns: tuple[re.Pattern[str], ...] = ()
    unread: tuple[str, ...] = ()
    """Patterns that are too intricate to be matched."""

    def __contains__(self, layer: str) -> bool:
        return any(
            name in self.exact or any(pattern.match(name) for pattern in self.patterns)
            for name in aliases(layer)
        )


@dataclass(frozen=True)
class Rules:
    """The format of each layer, as a configuration declares it."""

    named: Mapping[str, StoredFormat] = field(default_factory=dict)
    groups: tuple[tuple[Names, StoredFormat], ...] = ()
    whole: StoredFormat | None = None
    """The format of every other linear layer."""
    ignored: Names = Names()

    @property
    def unread(self) -> tuple[str, ...]:
        """Patterns that could not be matched; if any, only the tensors show what is quantized."""
        found = [*self.ignored.unread]
        for names, _ in self.groups:
            found += names.unread
        return tuple(found)

    def of(self, layer: str) -> StoredFormat | None:
        """Return the declared format of a linear layer; None where it is not quantized."""
        if layer in self.ignored:
            return None
        for name in aliases(layer):
            if name in self.named:
                return self.named[name]
        return next((form for names, form in self.groups if layer in names), self.whole)


def aliases(layer: str) -> tuple[str, ...]:
    """Return the names of a layer; transformers calls the trunk `model`."""
    if layer.startswith("backbone."):
        return layer, layer.replace("backbone.", "model.", 1)
    return (layer,)


def wildcards(names: Iterable[str]) -> Names:
    """Return the layers that names with `*`, as ModelOpt writes them, stand for."""
    exact = [name for name in names if "*" not in name]
    found = [re.compile(translate(name)) for name in names if "*" in name]
    return Names(frozenset(exact), tuple(found))


def targets(names: Iterable[str]) -> Names:
    """Return the layers that targets of compressed-tensors stand for: names, or `re:` patterns."""
    exact, found, unread = [], [], []
    for name in names:
        pattern = name.removeprefix("re:")
        if pattern == name:
            exact.append(name)
        elif is_simple(pattern):
            found.append(re.compile(pattern))
        else:
            unread.append(pattern)
    return Names(frozenset(exact), tuple(found), tuple(unread))


def is_simple(pattern: str) -> bool:
    """Say whether a regular expression of a stranger can be matched in bounded time."""
    repetitions = sum(pattern.count(part) for part in ("+", "*"))
    if len(pattern) > LONGEST_PATTERN or repetitions > MOST_REPETITIONS:
        return False
    return SIMPLE.fullmatch(pattern) is not None
