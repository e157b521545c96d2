"""From a recipe file to one checked configuration: defaults, file with `extends`, command line."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from nemotron.errors import UserError
from nemotron.recipe.blend import insert_blends
from nemotron.recipe.check import check
from nemotron.recipe.explain import explain
from nemotron.recipe.read import Document, Path_, parse_yaml, place_of, plain_scalar, read_yaml
from nemotron.recipe.stages import find_stage
from nemotron.train.config import PretrainConfig, RunConfig

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Recipe:
    """A checked configuration, and where each of its given values came from."""

    config: RunConfig
    path: Path
    places: dict[Path_, str]

    def overrides(self, *keys: Path_) -> bool:
        """Say whether the command line sets one of these keys."""
        return any(self.places.get(key) == COMMAND_LINE for key in keys)

    @property
    def pretraining(self) -> PretrainConfig:
        """The configuration, for a command that works on pre-training alone.

        Raises:
            UserError: when the recipe is for another stage.
        """
        if not isinstance(self.config, PretrainConfig):
            place = place_of(self.places, ("stage",), str(self.path))
            raise UserError(
                f"{place}: stage = {self.config.stage}; this command takes recipes of stage "
                "pretrain only."
            )
        return self.config


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge, resolve and check a recipe; `overrides` are `dotted.key=value` texts.

    Raises:
        UserError: one sentence with file, line, key and the right thing to write.
    """
    path = Path(path)
    document = _read_with_bases(path, ())
    for override in overrides:
        change = _read_override(override)
        insert_blends(change, Path())
        _expand_precision(change)
        _merge(document, change)
    values = _resolve(document)
    stage = find_stage(values, document.places, str(path))
    try:
        config = stage.recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error, stage.recipe, document.places, str(path))) from error
    check(config, stage, document.places, str(path))
    return Recipe(config, path, document.places)


def _read_with_bases(path: Path, chain: tuple[Path, ...]) -> Document:
    """Read a file on top of those that it extends, the first named at the bottom."""
    if path.resolve() in [seen.resolve() for seen in chain]:
        links = " -> ".join(str(link) for link in (*chain, path))
        raise UserError(f"{chain[-1]}: extends forms a cycle: {links}; remove one of them.")
    if chain and not path.is_file():
        links = " -> ".join(str(link) for link in (*chain, path))
        raise UserError(f"{chain[-1]}: extends names a file that does not exist: {links}.")
    own = read_yaml(path)
    insert_blends(own, path.parent)
    _expand_precision(own)
    place = own.places.get(("extends",), str(path))
    own.places = {key: line for key, line in own.places.items() if key[0] != "extends"}
    bases = own.values.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{place}: extends must be a file name or a list of them.")
    merged = Document()
    for base in bases:
        below = os.path.normpath(path.parent / base)
        _merge(merged, _read_with_bases(Path(below), (*chain, path)))
    _merge(merged, own)
    return merged


def _read_override(text: str) -> Document:
    key, equals, value = text.partition("=")
    parts = tuple(key.strip().split("."))
    if not equals or not all(parts):
        raise UserError(
            f"{COMMAND_LINE}: {text!r} is not a setting; write key=value, "
            f"for example schedule.peak=3e-4."
        )
    parsed: Any = _unwrap(parse_yaml(value, f"{COMMAND_LINE}: {key.strip()}"))
    places = {parts[: depth + 1]: COMMAND_LINE for depth in range(len(parts))}
    for part in reversed(parts):
        parsed = {part: parsed}
    return Document(parsed, places)


def _expand_precision(document: Document) -> None:
    """Replace `precision: NAME` by the preset of that name in bfloat16, or by plain `fp32`."""
    name = document.values.get("precision")
    if not isinstance(name, str) or "$" in name:
        return
    is_plain = name == "fp32"
    keys = {"compute": "fp32" if is_plain else "bf16", "preset": "bf16" if is_plain else name}
    document.values["precision"] = keys
    place = document.places[("precision",)]
    document.places |= {("precision", key): place for key in keys}


def _unwrap(value: Any) -> Any:
    if isinstance(value, CommentedMap):
        return {str(key): _unwrap(item) for key, item in value.items()}
    if isinstance(value, CommentedSeq):
        return [_unwrap(item) for item in value]
    return plain_scalar(value)


def _merge(below: Document, above: Document) -> None:
    """Lay `above` over `below`: mappings are merged, everything else is replaced."""
    for path, text in _texts(above.values):
        if "$" not in text:
            continue
        try:
            OmegaConf.create([text])
        except OmegaConfBaseException as error:
            place = above.places.get(path, "recipe")
            raise UserError(
                f"{place}: {'.'.join(path)} = {text} is not a reference; write ${{section.key}}."
            ) from error
    for path in list(below.places):
        if _replaced(below.values, above.values, path):
            del below.places[path]
    below.values = _laid_over(below.values, above.values)
    below.places.update(above.places)


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = below.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = _laid_over(old, value)
        merged[key] = value
    return merged


def _container(values: dict[str, Any]) -> DictConfig:
    return OmegaConf.create(values, flags={"allow_objects": False})


def _replaced(below: Any, above: Any, path: Path_) -> bool:
    """Say whether what stood at `path` is replaced as a whole, not merged key by key."""
    for part in path:
        if not isinstance(above, dict):
            return True
        if part not in above:
            return False
        above = above[part]
    return True


def _resolve(document: Document) -> dict[str, Any]:
    """Put the values in place of `${a.b}`; nothing but other keys can be named there."""
    for path, text in _texts(document.values):
        if re.search(r"\$\{[^}]*:", text):
            place = document.places.get(path, "recipe")
            raise UserError(
                f"{place}: {'.'.join(path)} = {text} may only name another key, as in "
                f"${{data.seq_len}}; functions and environment variables are not read."
            )
        if text == "???":
            place = document.places.get(path, "recipe")
            raise UserError(f"{place}: {'.'.join(path)} = ??? has no value yet; give it one.")
    if not any("$" in text for _, text in _texts(document.values)):
        return document.values
    config = _container(document.values)
    for path, text in _texts(document.values):
        if "${" not in text:
            continue
        try:
            OmegaConf.select(config, ".".join(path), throw_on_missing=True)
            OmegaConf.to_container(OmegaConf.create({"it": _at(config, path)}), resolve=True)
        except (OmegaConfBaseException, RecursionError) as error:
            place = document.places.get(path, "recipe")
            raise UserError(
                f"{place}: {'.'.join(path)} = {text} cannot be resolved; name an existing key "
                f"that does not refer back to this one."
            ) from error
    try:
        resolved = OmegaConf.to_container(config, resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        reason = " ".join(str(error).split("\n")[0].split())
        raise UserError(f"recipe: {reason}; correct the ${{...}} in it.") from error
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _at(config: DictConfig, path: Path_) -> Any:
    node: Any = config
    for part in path:
        node = node[int(part)] if not isinstance(node, DictConfig) else node[part]
    return node


def _texts(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(item, (*path, str(key)))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, (*path, str(index)))
    elif isinstance(value, str):
        yield path, value
