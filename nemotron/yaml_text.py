"""YAML 1.2 text as plain values, with the line of every key, within limits checked on the way.

A recipe is read from one document of mappings with text keys, lists and scalars. Merge keys and
tags are refused; an alias repeats the value of its anchor.
"""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.resolver import VersionedResolver

from nemotron.errors import UserError

Path_ = tuple[str, ...]
"""Keys from the top of a recipe to a value."""

MAX_DEPTH = 32
"""Mappings and lists inside each other."""
MAX_VALUES = 100_000
"""Values of one text, those that aliases repeat included."""
MAX_INTEGER = 10**30
"""Bound of whole numbers."""

RESOLVER = VersionedResolver()
BASES = {"0b": 2, "0o": 8, "0x": 16}
UNFIT = re.compile("[\0\ud800-\udfff]")
"""What no file, path or tokenizer can hold."""


def parse_yaml(
    text: str, source: str, places: dict[Path_, str] | None = None
) -> Any:  # Any: whatever the text holds
    """Return the values of YAML text, and add the location of each to `places`.

    Without `places` the text is one argument of a command, and mistakes have no line.

    Raises:
        UserError: when it is not valid YAML, or more than a recipe may hold, with the line.
    """
    try:
        return _Builder(source, places).document(YAML(typ="safe", pure=True).parse(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = " ".join(str(error.problem or error.context or "is not valid YAML").split())
        raise UserError(f"{problem}; correct the YAML there.", where=f"{source}{where}") from error
    except (YAMLError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{problem[:200]}; correct the YAML there.", where=source) from error


@dataclass
class _Anchor:
    """A value that aliases repeat, with what a copy of it costs."""

    value: Any
    size: int
    height: int


@dataclass
class _Builder:
    """Builds the values of one text from the events of the parser."""

    source: str
    places: dict[Path_, str] | None
    anchors: dict[str, _Anchor] = field(default_factory=dict)
    size: int = 0
    deepest: int = 0

    def document(self, events: Iterator[Event]) -> Any:
        value, documents = None, 0
        for event in events:
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self._mistake(event, "a second document begins; keep one a file")
                value = self._value(next(events), events, (), 0)
        return value

    def _value(self, event: Event, events: Iterator[Event], path: Path_, depth: int) -> Any:
        self._count(event, 1, depth)
        if isinstance(event, AliasEvent):
            return self._repeated(event, depth)
        assert isinstance(event, ScalarEvent | MappingStartEvent | SequenceStartEvent), event
        if event.tag is not None:
            raise self._mistake(event, f"the tag {event.tag} is not read; remove it")
        before, outer, self.deepest = self.size, self.deepest, depth
        value: Any
        if isinstance(event, MappingStartEvent):
            value = self._mapping(events, path, depth + 1)
        elif isinstance(event, SequenceStartEvent):
            value = self._sequence(events, path, depth + 1)
        else:
            value = self._scalar(event)
        if event.anchor:
            height = self.deepest - depth
            self.anchors[event.anchor] = _Anchor(value, self.size - before, height)
        self.deepest = max(outer, self.deepest)
        return value

    def _mapping(self, events: Iterator[Event], path: Path_, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        lines: dict[str, int] = {}
        while not isinstance(event := next(events), MappingEndEvent):
            key, line = self._key(event), event.start_mark.line + 1
            if key in result:
                raise self._mistake(
                    event,
                    f"the key {key} is given twice, first at line {lines[key]}; keep one of them",
                )
            lines[key] = line
            self._locate((*path, key), event)
            result[key] = self._value(next(events), events, (*path, key), depth)
        return result

    def _sequence(self, events: Iterator[Event], path: Path_, depth: int) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(events), SequenceEndEvent):
            here = (*path, str(len(items)))
            self._locate(here, event)
            items.append(self._value(event, events, here, depth))
        return items

    def _key(self, event: Event) -> str:
        if not isinstance(event, ScalarEvent) or event.tag is not None:
            raise self._mistake(event, "a key is not text; keys must be text")
        if event.value == "<<" and event.implicit[0]:
            raise self._mistake(
                event, "merge keys (<<) are not read; use extends or ${section.key} instead"
            )
        key = self._scalar(event)
        if not isinstance(key, str):
            raise self._mistake(event, f"the key {key!r} is not text; keys must be text")
        return key

    def _scalar(self, event: ScalarEvent) -> bool | int | float | str | None:
        text = event.value
        if UNFIT.search(text):
            raise self._mistake(event, "a text holds a null character or half a surrogate pair")
        if not event.implicit[0]:  # quoted
            return str(text)
        kind = str(RESOLVER.resolve(ScalarNode, text, event.implicit)).rpartition(":")[2]
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind not in ("int", "float") or not re.search(r"\d|inf|nan", text, re.IGNORECASE):
            return str(text)
        digits = text.replace("_", "")
        if kind == "float":
            return float(re.sub(r"\.(?=inf|nan)", "", digits.lower()))
        return self._integer(event, digits)

    def _integer(self, event: Event, digits: str) -> int:
        sign, magnitude = (digits[0], digits[1:]) if digits[0] in "+-" else ("", digits)
        base = BASES.get(magnitude[:2], 10)
        # int() itself refuses thousands of digits
        number = int(sign + (magnitude if base == 10 else magnitude[2:])[:200], base)
        if abs(number) >= MAX_INTEGER:
            shown = digits if len(digits) <= 24 else f"{digits[:20]}..."
            raise self._mistake(event, f"{shown} is too large; whole numbers stay below 1e30")
        return number

    def _repeated(self, event: AliasEvent, depth: int) -> Any:
        found = self.anchors.get(event.anchor)
        if found is None:
            raise self._mistake(
                event, f"the alias *{event.anchor} has no complete anchor before it; define it"
            )
        self._count(event, found.size, depth + found.height)
        return copy.deepcopy(found.value)

    def _count(self, event: Event, values: int, depth: int) -> None:
        self.size += values
        self.deepest = max(self.deepest, depth)
        if self.size > MAX_VALUES:
            raise self._mistake(
                event, f"there are more than {MAX_VALUES:,} values; repeat less by aliases"
            )
        if depth > MAX_DEPTH:
            raise self._mistake(
                event, f"mappings and lists are more than {MAX_DEPTH} levels deep; flatten them"
            )

    def _mistake(self, event: Event, problem: str) -> UserError:
        line = "" if self.places is None else f":{event.start_mark.line + 1}"
        return UserError(f"{problem}.", where=f"{self.source}{line}")

    def _locate(self, path: Path_, event: Event) -> None:
        if self.places is not None:
            self.places[path] = f"{self.source}:{event.start_mark.line + 1}"
