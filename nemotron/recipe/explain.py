"""A validation error as a finding: where, what is wrong, what would be right."""

import difflib
import re
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from nemotron.errors import Finding, RuleBroken
from nemotron.recipe import synonyms
from nemotron.recipe.read import Path_, place_of
from nemotron.train.config import RunConfig

EXPECTED = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping of keys",
    "string_pattern_mismatch": "must consist of letters, digits, '.', '_' and '-', and begin with "
    "a letter or a digit",
}
LARGEST_WRITTEN = 1e18
NAMED_KEYS = 6
"""Keys of a section that are named where something else was given."""


def explain(
    invalid: ValidationError, recipe: type[RunConfig], places: dict[Path_, str], source: str
) -> Finding:
    """Return the first problem of a recipe of this class.

    `places` says where each key stands.
    """
    problems = sorted(invalid.errors(), key=lambda e: e["type"] != "extra_forbidden")
    problem: dict[str, Any] = dict(problems[0])
    path = _path(recipe, [str(part) for part in problem["loc"]])
    forms, words = _has_forms(recipe, path), _words(recipe, path)
    key, value = ".".join(path), problem["input"]
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        return Finding(key, _unknown(recipe, path), where=place_of(places, path, source))
    if kind == "missing":
        rule = f"is missing; add it ({_description(recipe, path)})."
        return Finding(key, rule, where=place_of(places, path, source))
    if kind == "value_error":
        error = context["error"]
        own = error.finding if isinstance(error, RuleBroken) else Finding("", str(error))
        path = (*path, own.key)
        place = place_of(places, path, source)
        return Finding(".".join(filter(None, path)), f"{own.rule}.", own.value, place)
    if kind == "literal_error":
        if forms:
            listed = value if isinstance(value, list | tuple) else [value]
            value = next((item for item in listed if item not in words), value)
        expected = [word.strip("'") for word in re.split(", | or ", context["expected"])]
        rule = one_of(words if forms else expected, value)
    else:
        message = re.sub("^(Input|Value|String|Tuple) should", "must", problem["msg"])
        message = EXPECTED.get(kind, re.sub(r" after validation, not \d+$", "", message))
        if message == EXPECTED["int_type"] and isinstance(value, float) and value.is_integer():
            message += f"; write {int(value)}" if abs(value) < LARGEST_WRITTEN else ""
        if kind in ("model_type", "model_attributes_type"):
            message = _mapping(_section(recipe, path))
        rule = " or ".join([message, *(words if forms else [])])
        rule += "."
    return Finding(key, rule, value, place_of(places, path, source))


def one_of(words: list[str], given: Any) -> str:  # Any: what YAML holds
    """Say which words a key may be, and which one is nearest to what was given."""
    near = difflib.get_close_matches(given, words, 1) if isinstance(given, str) else []
    meant = f"; did you mean {near[0]}?" if near else "."
    listed = " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
    return f"must be one of {listed}{meant}"


def _mapping(section: type[BaseModel] | None) -> str:
    """Say that a section is a mapping, and of which keys."""
    keys = list(section.model_fields) if section else []
    if not keys:
        return "must be a mapping of keys"
    more = ", ..." if len(keys) > NAMED_KEYS else ""
    return f"must be a mapping of keys ({', '.join(keys[:NAMED_KEYS])}{more})"


def _path(recipe: type[RunConfig], location: list[str]) -> Path_:
    """Return the keys of a location, which ends with the form where a field has several."""
    for length in range(1, len(location)):
        if _has_forms(recipe, tuple(location[:length])):
            return tuple(location[:length])
    return tuple(location)


def _has_forms(recipe: type[RunConfig], path: Path_) -> bool:
    """Say whether a key takes one of several types, such as a number or a word."""
    field = _field(recipe, path)
    if field is None or get_origin(field.annotation) not in (Union, UnionType):
        return False
    return len(set(get_args(field.annotation)) - {NoneType}) > 1


def _words(recipe: type[RunConfig], path: Path_) -> list[str]:
    """Return the words that a key may be."""
    field = _field(recipe, path)
    return [word for word in _literals(field.annotation) if isinstance(word, str)] if field else []


def _literals(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [word for part in get_args(annotation) for word in _literals(part)]


def _unknown(recipe: type[RunConfig], path: Path_) -> str:
    *section_path, key = path
    section = _section(recipe, tuple(section_path)) or recipe
    homes = [
        ".".join(home) for home in _homes(recipe) if home[-1] == key and home[:-1] != path[:-1]
    ]
    if homes:
        holder = homes[0].rpartition(".")[0]
        right = f"it belongs under `{holder}`" if holder else "it belongs at the top"
        return f"is unknown; {right} ({homes[0]})."
    if ours := synonyms.hint(key):
        return f"is unknown; {ours}."
    near = difflib.get_close_matches(key, list(section.model_fields), 1, 0.5)
    if near:
        return f"is unknown; the nearest known one is `{near[0]}`."
    return f"is unknown; known are {', '.join(section.model_fields)}."


def _field(recipe: type[RunConfig], path: Path_) -> FieldInfo | None:
    section = _section(recipe, path[:-1]) if path else None
    return section.model_fields.get(path[-1]) if section else None


def _section(recipe: type[RunConfig], path: Path_) -> type[BaseModel] | None:
    section: type[BaseModel] | None = recipe
    for part in path:
        if section is None:
            return None
        if part.isdigit():
            continue
        found = section.model_fields.get(part)
        section = _model_in(found.annotation) if found else None
    return section


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        if found := _model_in(argument):
            return found
    return None


def _homes(recipe: type[RunConfig]) -> list[Path_]:
    homes: list[Path_] = []
    for name, field in recipe.model_fields.items():
        homes.append((name,))
        section = _model_in(field.annotation)
        if section is not None:
            homes.extend((name, key) for key in section.model_fields)
    return homes


def _description(recipe: type[RunConfig], path: Path_) -> str:
    found = _field(recipe, path)
    return (found.description or "needed").rstrip(".") if found else "needed"
