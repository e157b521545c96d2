"""Reads JSON and YAML that a model wrote: strictly, and in bounded time and memory."""

import json
from typing import Any

from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.events import AliasEvent, DocumentStartEvent

MAX_LENGTH = 100_000
"""Characters of the longest document that is read."""
MAX_DEPTH = 64


class BadDocument(ValueError):
    """A text is not one document of its kind."""


def read_document(text: str, kind: str) -> Any:  # Any: any JSON value
    """Return the value of a JSON or YAML document that makes up the whole text.

    Neither may repeat a key or have one that is not a text; JSON may not contain NaN or infinity,
    YAML no aliases, which could make a short text huge.

    Raises:
        BadDocument: when it is not such a document.
    """
    if not text.strip() or len(text) > MAX_LENGTH:
        raise BadDocument("empty or too long")
    if max(text.count("["), text.count("{")) > MAX_LENGTH // 10:
        raise BadDocument("too deep")
    try:
        value = _read_json(text) if kind == "json" else _read_yaml(text)
    except (ValueError, YAMLError, RecursionError) as error:
        raise BadDocument(str(error)) from None
    if not _is_json(value, 0):
        raise BadDocument("contains what JSON does not")
    return value


def _read_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise BadDocument("a key occurs twice")
    return found


def _read_yaml(text: str) -> Any:
    starts = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        starts += isinstance(event, DocumentStartEvent)
        if isinstance(event, AliasEvent) or starts > 1:
            raise BadDocument("an alias or a second document")
    return YAML(typ="safe", pure=True).load(text)


def _is_json(value: Any, depth: int) -> bool:
    """Whether a value has a JSON form of bounded depth; YAML knows dates, sets and more."""
    if depth > MAX_DEPTH:
        return False
    if isinstance(value, dict):
        keys = all(isinstance(key, str) for key in value)
        return keys and all(_is_json(inner, depth + 1) for inner in value.values())
    if isinstance(value, list):
        return all(_is_json(inner, depth + 1) for inner in value)
    if isinstance(value, float):
        return value - value == 0  # neither infinite nor NaN
    return value is None or isinstance(value, str | int | bool)
