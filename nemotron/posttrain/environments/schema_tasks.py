"""Random schemas, and texts with the facts that belong into a document of each."""

import random
from dataclasses import dataclass
from typing import Any

from nemotron.posttrain.environments.words import CITIES, FIRST_NAMES, ITEMS, LAST_NAMES

Schema = dict[str, Any]
COLORS = ("red", "green", "blue", "black", "white")


@dataclass(frozen=True)
class SchemaTask:
    """A schema and the text that its document is to be made from."""

    schema: Schema
    text: str


@dataclass(frozen=True)
class _Property:
    name: str
    schema: Schema
    sentence: str


def generate(rng: random.Random, level: int) -> SchemaTask:
    """Return a task with `2 + level` properties, some of them nested from level 2."""
    size = min(2 + level, 10)
    kinds = rng.sample(FLAT, min(size, len(FLAT)))
    properties = [kind(rng) for kind in kinds]
    for number in range(max(0, size - len(FLAT)) + min(level // 2, 3)):
        properties.append(_nested(rng, number, level))
    rng.shuffle(properties)
    schema = {"type": "object", "properties": {each.name: each.schema for each in properties}}
    return SchemaTask(schema, " ".join(each.sentence for each in properties))


def _name(rng: random.Random) -> _Property:
    name = f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
    return _Property("name", {"type": "string", "minLength": 3}, f"The customer is {name}.")


def _city(rng: random.Random) -> _Property:
    schema = {"type": "string", "minLength": 2, "maxLength": 30}
    return _Property("city", schema, f"It goes to {rng.choice(CITIES)}.")


def _age(rng: random.Random) -> _Property:
    schema = {"type": "integer", "minimum": 18, "maximum": 99}
    return _Property("age", schema, f"The buyer is {rng.randint(18, 99)} years old.")


def _price(rng: random.Random) -> _Property:
    schema = {"type": "number", "exclusiveMinimum": 0}
    return _Property("price", schema, f"The price is {rng.randint(100, 99999) / 100:.2f}.")


def _paid(rng: random.Random) -> _Property:
    state = rng.choice(("has been paid", "has not been paid"))
    return _Property("paid", {"type": "boolean"}, f"The bill {state}.")


def _color(rng: random.Random) -> _Property:
    colors = rng.sample(COLORS, 3)
    return _Property("color", {"enum": colors}, f"The color is {rng.choice(colors)}.")


def _date(rng: random.Random) -> _Property:
    schema = {"type": "string", "pattern": "^\\d{4}-\\d{2}-\\d{2}$"}
    date = f"{rng.randint(2020, 2026)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    return _Property("date", schema, f"The date is {date}.")


def _note(rng: random.Random) -> _Property:
    said = rng.choice(("There is no note.", "The note says: leave it at the door."))
    return _Property("note", {"type": ["string", "null"]}, said)


def _tags(rng: random.Random) -> _Property:
    tags = rng.sample(ITEMS, rng.randint(1, 4))
    schema = {"type": "array", "items": {"type": "string"}, "minItems": 1, "uniqueItems": True}
    return _Property("tags", schema, f"The tags are {', '.join(tags)}.")


FLAT = (_name, _city, _age, _price, _paid, _color, _date, _note, _tags)


def _nested(rng: random.Random, number: int, level: int) -> _Property:
    """Return a list of objects, or at high levels one object inside another."""
    item = {
        "type": "object",
        "properties": {
            "item": {"type": "string", "minLength": 1},
            "count": {"type": "integer", "minimum": 1},
        },
    }
    picked = rng.sample(ITEMS, rng.randint(1, 3))
    said = ", ".join(f"{rng.randint(1, 9)} times {each}" for each in picked)
    name = f"parcel_{number + 1}"
    schema: Schema = {"type": "array", "items": item, "minItems": 1}
    if level >= 4:
        schema = {
            "type": "object",
            "properties": {"sender": {"type": "string", "minLength": 1}, "content": schema},
        }
        said += f", sent by {rng.choice(FIRST_NAMES)}"
    return _Property(name, schema, f"Parcel {number + 1} contains {said}.")
