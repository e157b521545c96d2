"""From a recipe file to one checked configuration: defaults, file with `extends`, command line."""

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from nemotron.errors import UserError
from nemotron.posttrain.config import RlConfig
from nemotron.posttrain.correct.config import CorrectConfig
from nemotron.recipe.blend import insert_blends
from nemotron.recipe.check import check, find_stage
from nemotron.recipe.explain import explain
from nemotron.recipe.read import Budget, Document, Path_, place_of, read_yaml
from nemotron.recipe.references import check_references, expand_names, resolve
from nemotron.recipe.shipped import find
from nemotron.recipe.stages import Stage
from nemotron.train.config import LENGTHS, RunConfig, TextConfig, length_keys
from nemotron.yaml_text import parse_yaml

if TYPE_CHECKING:
    from nemotron.train.setup import Stage as TrainedStage

COMMAND_LINE = "command line"
OF_TEXT = ("pretrain", "sft")  # stages that learn from text alone


@dataclass(frozen=True)
class Parents:
    """The recipes that one extends, and their values, merged but neither resolved nor checked.

    Of a recipe that extends none, the values are those of its file.
    """

    names: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A checked configuration, and where each of its given values came from."""

    config: RunConfig
    path: Path
    places: dict[Path_, str]
    stage: Stage
    files: tuple[Path, ...] = ()
    """Every file that was read for it."""
    parents: Parents = field(default_factory=Parents)
    """What it extends."""

    def overrides(self, *keys: Path_) -> bool:
        """Say whether the command line sets one of these keys."""
        return any(self.places.get(key) == COMMAND_LINE for key in keys)

    @property
    def text(self) -> TextConfig:
        """The configuration, for a command that works on stages that learn from text alone.

        Raises:
            UserError: when the recipe is for another stage.
        """
        if not isinstance(self.config, TextConfig) or self.config.stage not in OF_TEXT:
            place = place_of(self.places, ("stage",), str(self.path))
            rule = (
                "is not for this command, which takes recipes of the stages pretrain and sft only."
            )
            raise UserError(rule, key="stage", value=self.config.stage, where=place)
        return self.config

    @property
    def updates(self) -> RunConfig:
        """The configuration, for a command that predicts the cost of updates.

        Raises:
            UserError: when the recipe is for a stage whose updates are not predicted.
        """
        return self.config if isinstance(self.config, RlConfig | CorrectConfig) else self.text

    @property
    def trained(self) -> "TrainedStage":
        """What trains the recipe; PyTorch is imported for it.

        Raises:
            UserError: when nothing does.
        """
        if self.stage.trained is None:
            place = place_of(self.places, ("stage",), str(self.path))
            rule = "can be read and checked, but nothing trains such recipes yet."
            raise UserError(rule, key="stage", value=self.config.stage, where=place)
        stage = self.stage.trained()
        if not self.config.evaluation.suites.names:
            return stage
        from nemotron.posttrain.suites.training import WithSuites

        return WithSuites(stage)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge, resolve and check a recipe; `overrides` are `dotted.key=value` texts.

    `path` is a file, or the name of a recipe that ships with the package, such as tiny/pretrain.

    Raises:
        UserError: one sentence with file, line, key and the right thing to write.
    """
    name, path, budget = str(path), Path(path), Budget()
    path = path if os.path.isfile(path) else find(path, name)
    own = _read_own(path, (), budget)
    names, document = _read_bases(own, path, (), budget)
    parents = Parents(tuple(names), copy.deepcopy(document.values if names else own.values))
    _lay_over(document, own)
    for override in overrides:
        change = _read_override(override)
        if "blend" in override:
            insert_blends(change, Path(), budget)
        _lay_over(document, change)
    values = resolve(document)
    stage = find_stage(values, document.places, str(path))
    try:
        config = stage.recipe.model_validate(_wrap_single_items(values, stage.recipe))
    except ValidationError as error:
        found = explain(error, stage.recipe, document.places, str(path))
        raise UserError.of(found) from error
    check(config, stage, document.places, str(path))
    files = tuple(dict.fromkeys(budget.paths))
    return Recipe(config, path, document.places, stage, files, parents)


def _read_own(path: Path, chain: tuple[Path, ...], budget: Budget) -> Document:
    """Read a file alone; `chain` names the files that led to it."""
    links = " -> ".join(str(link) for link in (*chain, path))
    if os.path.realpath(path) in map(os.path.realpath, chain):
        rule = f"forms a cycle: {links}; remove one of them."
        raise UserError(rule, key="extends", where=str(chain[-1]))
    if chain and not os.path.isfile(path):
        rule = f"names a file that does not exist: {links}."
        raise UserError(rule, key="extends", where=str(chain[-1]))
    own = read_yaml(path, budget)
    if any("blend" in key for key in own.places):
        insert_blends(own, path.parent, budget)
    return own


def _read_bases(
    own: Document, path: Path, chain: tuple[Path, ...], budget: Budget
) -> tuple[list[str], Document]:
    """Return the names that a file extends, and these recipes merged, the first at the bottom."""
    merged = Document()
    names = _take_names(own, "extends", "a file name", str(path))
    for base in names:
        below = Path(os.path.normpath(path.parent / base))
        below = below if os.path.isfile(below) else find(below, base)
        document = _read_own(below, (*chain, path), budget)
        _, under = _read_bases(document, below, (*chain, path), budget)
        _lay_over(under, document)
        _lay_over(merged, under)
    return names, merged


def _take_names(document: Document, key: str, what: str, source: str) -> list[str]:
    """Remove a key that holds a text or a list of texts; return them."""
    place = document.places.get((key,), source)
    names = document.values.pop(key, [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"must be {what} or a list of them.", key=key, where=place)
    document.places = {path: line for path, line in document.places.items() if path[0] != key}
    return names


def _read_override(text: str) -> Document:
    key, equals, value = text.partition("=")
    parts = tuple(key.strip().split("."))
    if not equals or not all(parts):
        raise UserError(
            f"{text!r} is not a setting; write key=value, for example schedule.peak=3e-4.",
            where=COMMAND_LINE,
        )
    parsed: Any = parse_yaml(value, f"{COMMAND_LINE}: {key.strip()}")
    places = {parts[: depth + 1]: COMMAND_LINE for depth in range(len(parts))}
    for part in reversed(parts):
        parsed = {part: parsed}
    return Document(parsed, places)


def _lay_over(below: Document, above: Document) -> None:
    """Lay `above` over `below`: mappings are merged, everything else is replaced.

    First, what `above` lists under `remove` goes from `below`, and lengths that it gives anew.
    """
    place = above.places.get(("remove",), "recipe")
    for name in _take_names(above, "remove", "a key such as schedule.decay_steps", place):
        _remove(below, tuple(name.split(".")), place)
    _drop_replaced_lengths(below, above)
    check_references(above)
    expand_names(above)
    for path in list(below.places):
        if _replaced(below.values, above.values, path):
            del below.places[path]
    below.values = _laid_over(below.values, above.values)
    below.places.update(above.places)


def _remove(document: Document, path: Path_, place: str) -> None:
    """Remove a key that an extended recipe sets; its default then holds again."""
    holder: Any = document.values
    for part in path[:-1]:
        holder = holder.get(part) if isinstance(holder, dict) else None
    if not isinstance(holder, dict) or path[-1] not in holder:
        raise UserError(
            f"names {'.'.join(path)}, which no recipe below sets; take it off the list.",
            key="remove",
            where=place,
        )
    del holder[path[-1]]
    kept = {key: line for key, line in document.places.items() if key[: len(path)] != path}
    document.places = kept


def _drop_replaced_lengths(below: Document, above: Document) -> None:
    """Remove from `below` the lengths that the schedule of `above` takes the place of.

    So `schedule.total_tokens` replaces an extended `total_steps`, and `kind: cosine`, which has no
    decay of its own, an extended `decay_steps`. What two settings of one place say is left to be
    refused, for example two on the command line.
    """
    old, new = below.values.get("schedule"), above.values.get("schedule")
    if not isinstance(old, dict) or not isinstance(new, dict):
        return
    for key, replaced in _replacements(new):
        path = ("schedule", replaced)
        is_there = old.get(replaced) is not None and replaced not in new
        place = place_of(above.places, ("schedule", key), "")
        if is_there and place_of(below.places, path, "") != place:
            below.values["schedule"] = old = {k: v for k, v in old.items() if k != replaced}
            below.places.pop(path, None)


def _replacements(schedule: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each key that gives a length or the kind, with a key that it leaves no effect."""
    for name in LENGTHS:
        keys = length_keys(name)
        given = [key for key in keys if schedule.get(key) is not None]
        yield from ((key, other) for key in given for other in keys)
    kind = schedule.get("kind", "wsd")
    if kind != "wsd":
        yield from (("kind", key) for key in ("decay", *length_keys("decay")))
    if kind == "constant":
        yield "kind", "min"


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = below.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = _laid_over(old, value)
        merged[key] = value
    return merged


def _replaced(below: Any, above: Any, path: Path_) -> bool:
    """Say whether what stood at `path` is replaced as a whole, not merged key by key."""
    for part in path:
        if not isinstance(above, dict):
            return True
        if part not in above:
            return False
        above = above[part]
    return True


def _wrap_single_items(values: Any, section: type[BaseModel]) -> Any:  # Any: not yet validated
    """Return the values of a section, with lists of one where it takes a list and has an item.

    So a recipe may say `trackers: wandb`.
    """
    if not isinstance(values, dict):
        return values
    return {key: _wrap_item(value, section, key) for key, value in values.items()}


def _wrap_item(value: Any, section: type[BaseModel], key: str) -> Any:
    field = section.model_fields.get(key)
    if field is None or value is None:
        return value
    forms = _alternatives(field.annotation)
    value = _as_list(value, forms)
    inner = [item for form in forms for item in (form, *get_args(form)) if _is_section(item)]
    if not inner:
        return value
    if isinstance(value, list | tuple):
        return [_wrap_single_items(item, inner[0]) for item in value]
    return _wrap_single_items(value, inner[0])


def _is_section(form: Any) -> bool:
    return isinstance(form, type) and issubclass(form, BaseModel)


def _as_list(value: Any, forms: list[Any]) -> Any:
    if isinstance(value, list | tuple):
        return value
    items = [get_args(form)[0] for form in forms if _is_list(form)]
    others = [form for form in forms if not _is_list(form) and form is not type(None)]
    if others:  # a word such as `recompute: mamba` is wrapped if only an item can be meant
        return [value] if any(value in get_args(item) for item in items) else value
    return [value] if items else value


def _is_list(form: Any) -> bool:
    return get_origin(form) is tuple and get_args(form)[-1] is Ellipsis


def _alternatives(annotation: Any) -> list[Any]:
    """Return the members of a union, without their metadata."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [form for member in get_args(annotation) for form in _alternatives(member)]
    return [annotation]
