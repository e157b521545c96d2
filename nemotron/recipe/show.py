"""A recipe for people: resolved with the origin of each value, compared, and as a JSON schema."""

import json
from collections.abc import Sequence
from typing import Any

from pydantic import JsonValue
from pydantic.json_schema import models_json_schema

from nemotron.recipe.flat import flat, value_text
from nemotron.recipe.load import COMMAND_LINE, Recipe
from nemotron.recipe.read import Path_
from nemotron.recipe.references import WORDS
from nemotron.recipe.stages import DEFAULT, STAGES


def show(recipe: Recipe) -> str:
    """Return the whole resolved recipe as YAML, each value with a comment that says its origin."""
    lines: list[str] = []
    _add(lines, recipe.config.model_dump(mode="json"), (), recipe.places)
    width = min(60, max(len(text) for text, _ in _split(lines)))
    return "\n".join(
        f"{text:<{width}}  # {origin}" if origin else text for text, origin in _split(lines)
    )


def diff(first: Recipe, second: Recipe) -> list[tuple[str, str, str]]:
    """Return (key, value in the first, value in the second) for every value that differs."""
    a, b = (flat(recipe.config.model_dump(mode="json")) for recipe in (first, second))
    keys = [*a, *(key for key in b if key not in a)]
    return [
        (key, a.get(key, "absent"), b.get(key, "absent"))
        for key in keys
        if a.get(key) != b.get(key)
    ]


def origin(recipe: Recipe, words: Sequence[str]) -> dict[str, JsonValue]:
    """Return what a run remembers of where its recipe comes from.

    `words` are those of the command line. The changes are what the file and the command line set to
    another value than the recipes that the file extends; if it extends none, what the command line
    sets to another value than the file.
    """
    config, below = flat(recipe.config.model_dump(mode="json")), flat(recipe.parents.values)
    places = {".".join(path): place for path, place in recipe.places.items()}
    own = (COMMAND_LINE, f"{recipe.path}:") if recipe.parents.names else COMMAND_LINE
    changes: list[JsonValue] = [
        {"setting": key, "parent": below.get(key, "not set"), "value": value}
        for key, value in config.items()
        if value != below.get(key) and places.get(key, "").startswith(own)
    ]
    return {"recipe": " ".join(words), "extends": [*recipe.parents.names], "changes": changes}


def schema() -> str:
    """Return the JSON schema of recipes, for completion and checks in an editor."""
    recipes = [stage.recipe for stage in STAGES.values()]
    names, document = models_json_schema([(recipe, "validation") for recipe in recipes])
    refs = {name: names[stage.recipe, "validation"] for name, stage in STAGES.items()}
    sections = document["$defs"]
    for ref in refs.values():
        _add_shorthand(sections[ref["$ref"].rpartition("/")[2]]["properties"])
    for section in ("DataConfig", "PhaseConfig", "LengthConfig"):
        properties = sections[section]["properties"]
        inline = properties.get("blend", {}).get("anyOf", [])
        file = {"type": "string", "description": "Path of a blend file, relative to this file."}
        properties["blend"] = {"anyOf": [file, *inline]}
    for section in ("SourceConfig", "ValidationConfig"):
        path = {"type": "string", "description": "The path alone, or an embedded domain."}
        sections[section] = {"anyOf": [path, sections[section]]}
    _loosen(document)
    document |= {"title": "nemotron recipe", "type": "object"}
    document["properties"] = {"stage": {"enum": list(STAGES), "default": DEFAULT}}
    document["allOf"] = [{"if": _names(name), "then": ref} for name, ref in refs.items()]
    return json.dumps(document, indent=2) + "\n"


def _add_shorthand(properties: dict[str, Any]) -> None:
    """Allow what is replaced before a recipe is checked."""
    properties["extends"] = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        "description": "Recipe, or recipes, whose values this one starts from.",
    }
    properties["remove"] = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        "description": "Dotted key, or keys, of the extended recipes that this one leaves out.",
    }
    descriptions = {
        "precision": "fp32, or a preset in bfloat16.",
        "ops": "Backend of every operation that has it.",
    }
    for name, words in WORDS.items():
        section = properties[name]
        word = {"enum": list(words), "description": descriptions[name]}
        section["anyOf"] = [word, {"$ref": section.pop("$ref")}]


def _names(stage: str) -> dict[str, Any]:
    """Return the schema of recipes that name a stage; the default one need not be named."""
    condition: dict[str, Any] = {"properties": {"stage": {"const": stage}}}
    return condition if stage == DEFAULT else condition | {"required": ["stage"]}


def _loosen(node: Any) -> None:
    """Drop `required`, because a base may give a key, and allow `${key}` in place of any value."""
    if isinstance(node, dict):
        node.pop("required", None)
        for item in node.values():
            _loosen(item)
        if node.get("type") in ("integer", "number", "boolean"):
            plain = {
                key: node.pop(key) for key in list(node) if key not in ("description", "title")
            }
            default = plain.pop("default", None)
            node["anyOf"] = [plain, {"type": "string", "pattern": r"^\$\{.*\}$"}]
            if default is not None:
                node["default"] = default
    elif isinstance(node, list):
        for item in node:
            _loosen(item)


def _add(lines: list[str], values: dict[str, Any], path: Path_, places: dict[Path_, str]) -> None:
    indent = "  " * len(path)
    for key, value in values.items():
        here = (*path, key)
        if isinstance(value, dict) and value:
            lines.append(f"{indent}{key}:\0")
            _add(lines, value, here, places)
        else:
            origin = places.get(here, "default")
            lines.append(f"{indent}{key}: {value_text(value)}\0{origin}")


def _split(lines: list[str]) -> list[tuple[str, str]]:
    return [(line.partition("\0")[0], line.partition("\0")[2]) for line in lines]
