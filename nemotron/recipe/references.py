"""What stands for something else in a recipe: `${data.seq_len}`, and the name of a preset."""

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from nemotron.errors import UserError
from nemotron.ops.config import PRESETS
from nemotron.precision.config import Preset
from nemotron.recipe.explain import one_of
from nemotron.recipe.read import Document, Path_, place_of

WORDS: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "precision": {
        "fp32": {"compute": "fp32", "preset": "bf16"},
        **{name: {"compute": "bf16", "preset": name} for name in get_args(Preset)},
    },
    "ops": PRESETS,
}
"""What a name stands for in place of a section, by section."""

REFERENCE = re.compile(r"\$\{([A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*)\}")
MAX_TEXT = 4096
"""Longest text that references may build."""
MAX_CHAIN = 32
"""References that may lead to each other."""

Scalar = bool | int | float | str | None


def check_references(document: Document) -> None:
    """Check the form of every reference, so that a mistake is placed in the file that holds it.

    Raises:
        UserError: for a `${` that does not begin the name of a key.
    """
    for path, text in _texts(document.values):
        if "${" in REFERENCE.sub("", text):
            rule = (
                "may only name another key, as in ${data.seq_len}; functions and environment "
                "variables are not read."
            )
            raise _mistake(document, path, text, rule)


def resolve(document: Document) -> dict[str, Any]:
    """Return the values with every reference replaced; a whole text takes the other key's type.

    Raises:
        UserError: when a key is unknown, refers back to itself or is a section, or has no value
            yet (`???`).
    """
    for path, text in _texts(document.values):
        if text == "???":
            raise _mistake(document, path, text, "has no value yet; give it one.")
    resolved = _Resolver(document).of(document.values, ())
    assert isinstance(resolved, dict)
    return resolved


class _Resolver:
    """Resolves each text of a document once."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.texts = dict(_texts(document.values))
        self.scalars = dict(_scalars(document.values))
        self.done: dict[Path_, Scalar] = {}

    def of(self, value: Any, path: Path_) -> Any:
        if isinstance(value, dict):
            return {key: self.of(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self.of(item, (*path, str(at))) for at, item in enumerate(value)]
        return self.scalar(path, ())

    def scalar(self, path: Path_, chain: tuple[Path_, ...]) -> Scalar:
        """Return the value of a key; `chain` are the keys that refer to it."""
        text = self.texts.get(path, "")
        if "${" not in text:
            return self.scalars[path]
        if path not in self.done:
            self.done[path] = self._replace(path, text, (*chain, path))
        return self.done[path]

    def _replace(self, path: Path_, text: str, chain: tuple[Path_, ...]) -> Scalar:
        whole = REFERENCE.fullmatch(text)
        if whole:
            return self._named(path, whole[1], chain)
        result = REFERENCE.sub(lambda m: _shown(self._named(path, m[1], chain)), text)
        if len(result) > MAX_TEXT:
            raise self._mistake(path, f"becomes longer than {MAX_TEXT} characters; shorten it.")
        return result

    def _named(self, path: Path_, name: str, chain: tuple[Path_, ...]) -> Scalar:
        target = tuple(name.split("."))
        if target in chain:
            cycle = (*chain[chain.index(target) :], target)
            links = " -> ".join(".".join(key) for key in cycle)
            rule = f"refers back to itself ({links}); give one of them a value."
            raise self._mistake(target, rule)
        if len(chain) > MAX_CHAIN:
            raise self._mistake(path, f"ends a chain of over {MAX_CHAIN} references; shorten it.")
        if target in self.scalars:
            return self.scalar(target, chain)
        if any(key[: len(target)] == target for key in self.scalars):
            raise self._mistake(path, "names a section or list; name a single value in it.")
        near = difflib.get_close_matches(name, [".".join(key) for key in self.scalars], 1)
        hint = f"; the nearest is {near[0]}." if near else "; name a key that it sets."
        raise self._mistake(path, f"names a key that the recipe does not set{hint}")

    def _mistake(self, path: Path_, rule: str) -> UserError:
        return _mistake(self.document, path, self.texts[path], rule)


def _mistake(document: Document, path: Path_, text: str, rule: str) -> UserError:
    where = place_of(document.places, path, "recipe")
    return UserError(rule, key=".".join(path), value=text, where=where)


def _shown(value: Scalar) -> str:
    """Return a value inside a text, as YAML writes it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)


def _texts(values: Any) -> Iterator[tuple[Path_, str]]:
    for path, value in _scalars(values):
        if isinstance(value, str):
            yield path, value


def _scalars(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Scalar]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _scalars(item, (*path, str(key)))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _scalars(item, (*path, str(index)))
    else:
        yield path, value


def expand_names(document: Document) -> None:
    """Replace the name of a preset in place of a section by the keys that it stands for.

    Raises:
        UserError: for an unknown name.
    """
    for section, meanings in WORDS.items():
        name = document.values.get(section)
        if not isinstance(name, str) or "$" in name:
            continue
        place = document.places[(section,)]
        if name not in meanings:
            raise UserError(one_of(list(meanings), name), key=section, value=name, where=place)
        document.values[section] = dict(meanings[name])
        document.places |= {(section, key): place for key in meanings[name]}
