"""A validation error as a finding: where, what is wrong, what would be right."""

import difflib
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

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
    "model_type": "must be a mapping of keys",
    "model_attributes_type": "must be a mapping of keys",
    "dict_type": "must be a mapping of keys",
}


def explain(
    invalid: ValidationError, recipe: type[RunConfig], places: dict[Path_, str], source: str
) -> Finding:
    """Return the first problem of a recipe of this class.

    `places` says where each key stands.
    """
    problems = sorted(invalid.errors(), key=lambda e: e["type"] != "extra_forbidden")
    problem: dict[str, Any] = dict(problems[0])
    parts = [str(part) for part in problem["loc"]]
    path = tuple(part for part in parts if "[" not in part)  # that names one form of several
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
    if kind in EXPECTED:
        rule = EXPECTED[kind]
    elif kind == "literal_error":
        expected, words = context["expected"].replace("'", ""), _words(recipe, path)
        if len(path) < len(parts):
            expected = f"{', '.join(words[:-1])} or {words[-1]}"
            listed = value if isinstance(value, list | tuple) else [value]
            value = next((item for item in listed if item not in words), value)
        rule = f"must be one of {expected}"
        if isinstance(value, str):
            near = difflib.get_close_matches(value, words, 1)
            rule += f"; did you mean {near[0]}?" if near else ""
    else:
        rule = problem["msg"].replace("Input should", "must").replace("Value should", "must")
        rule = rule.replace("String should", "must").replace("Tuple should", "must")
    end = "" if rule.endswith("?") else "."
    return Finding(key, f"{rule}{end}", value, place_of(places, path, source))


def _words(recipe: type[RunConfig], path: Path_) -> list[str]:
    """Return the words that a key may be."""
    section = _section(recipe, path[:-1])
    field = section.model_fields.get(path[-1]) if section else None
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
    section = _section(recipe, path[:-1])
    found = section.model_fields.get(path[-1]) if section else None
    return (found.description or "needed").rstrip(".") if found else "needed"
