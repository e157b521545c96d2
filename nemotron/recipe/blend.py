"""Blend files that a recipe names: read, and put where the recipe names them."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemotron.data.config import BlendConfig
from nemotron.errors import UserError
from nemotron.files import parse_json
from nemotron.recipe.read import Budget, Document, Path_, read_yaml_values

KEYS = tuple(BlendConfig.model_fields)
SPLITS = ("train", "valid", "validation", "test")
"""Of Megatron's blends."""


def insert_blends(document: Document, folder: Path, budget: Budget | None = None) -> None:
    """Replace every `blend: FILE` by what the file holds; paths are relative to `folder`.

    Under `data` the keys of the file take the place of `blend`; under a phase or a length they
    stand below it. The files that were read are in `document.places`; `budget` is what the recipe
    may still read.
    """
    _insert(document, document.values, (), folder, budget or Budget())


def read_blend(path: Path, budget: Budget | None = None) -> Document:
    """Read a blend file, ours or Megatron's, as the keys of `BlendConfig`.

    Raises:
        UserError: when it is neither.
    """
    is_json = path.suffix == ".json"
    budget = budget or Budget()
    document = Document(_read_json(path, budget)) if is_json else read_yaml_values(path, budget)
    content: Any = document.values
    if is_megatron_blend(content):
        return Document(read_megatron_blend(content, str(path)))
    if not isinstance(content, dict) or "sources" not in content:
        raise UserError(
            "is not a blend; it must have the key sources, or be a list of weights and "
            "prefixes as Megatron reads it.",
            where=str(path),
        )
    if unknown := [key for key in content if key not in KEYS]:
        raise UserError(
            f"is unknown in a blend; known are {', '.join(KEYS)}.",
            key=unknown[0],
            where=document.places.get((unknown[0],), str(path)),
        )
    return document


def is_megatron_blend(content: object) -> bool:
    """Say whether parsed JSON or YAML is Megatron's form: a list, or lists by split."""
    if isinstance(content, list):
        return not all(isinstance(item, dict) for item in content)
    return isinstance(content, dict) and isinstance(content.get("train"), list)


def read_megatron_blend(content: Any, place: str) -> dict[str, Any]:  # Any: nested JSON
    """Return the keys of `BlendConfig` for Megatron's `[weight, prefix, ...]` or `[prefix, ...]`.

    Prefixes of `valid` become sets that are only evaluated; `test` is not read during training.
    Source: NVIDIA/Megatron-LM: megatron/core/datasets/utils.py, get_blend_from_list.

    Raises:
        UserError: when it is not such a list.
    """
    splits = content if isinstance(content, Mapping) else {"train": content}
    if unknown := [name for name in splits if name not in SPLITS]:
        rule = f"is not a split; known are {', '.join(SPLITS)}."
        raise UserError(rule, key=str(unknown[0]), where=place)
    names: dict[str, str] = {}
    sources = [
        {"name": _name(prefix, names), "weight": weight, "path": prefix}
        for weight, prefix in _pairs(splits["train"], f"{place}: train")
    ]
    held_out = [
        {"name": _name(prefix, names), "path": prefix}
        for split in ("valid", "validation")
        for _, prefix in _pairs(splits.get(split) or [], f"{place}: {split}")
    ]
    if not sources:
        raise UserError("is empty; list weights and prefixes.", key="train", where=place)
    return {"sources": sources, "validation": held_out}


def _insert(document: Document, values: Any, path: Path_, folder: Path, budget: Budget) -> None:
    if isinstance(values, list):
        for index, item in enumerate(values):
            _insert(document, item, (*path, str(index)), folder, budget)
        return
    if not isinstance(values, dict) or path[:1] not in ((), ("data",), ("phases",)):
        return
    named = values.get("blend")
    if isinstance(named, str):
        place = document.places.get((*path, "blend"), "recipe")
        if both := [key for key in KEYS if key in values]:
            rule = f"is given together with {both[0]}; keep one of them."
            key = ".".join((*path, "blend"))
            raise UserError(rule, key=key, value=Path(named), where=place)
        file = Path(os.path.normpath(folder / named))
        found = read_blend(file, budget)
        if path == ("data",):
            del values["blend"]
            document.places.pop((*path, "blend"), None)
            # a file replaces a base's blend as a whole, also in what it leaves out
            values.update({"tiers": {}, "validation": [], "missing": []} | found.values)
            at: Path_ = path
        else:
            values["blend"] = found.values
            at = (*path, "blend")
        for key in found.values:
            document.places[(*at, key)] = str(file)
        document.places.update({(*at, *key): line for key, line in found.places.items()})
    for key, item in values.items():
        _insert(document, item, (*path, key), folder, budget)


def _read_json(path: Path, budget: Budget) -> Any:  # Any: nested JSON
    text = budget.read(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"{error}; correct the JSON there.", where=str(path)) from None


def _pairs(items: Sequence[Any], place: str) -> list[tuple[float, str]]:
    if all(isinstance(item, str) and _number(item) is None for item in items):
        return [(1.0, str(item)) for item in items]
    if len(items) % 2:
        raise UserError(
            f"has {len(items)} entries; write weight and prefix in turn, or prefixes alone.",
            where=str(place),
        )
    pairs = []
    for at in range(0, len(items), 2):
        weight, prefix = _number(items[at]), items[at + 1]
        if weight is None or not weight > 0 or not isinstance(prefix, str):
            raise UserError(
                f"{items[at]!r}, {prefix!r} must be a weight above 0 and the path of a shard "
                "without its ending.",
                where=f"{place}, entries {at} and {at + 1}",
            )
        pairs.append((weight, prefix))
    return pairs


def _number(item: object) -> float | None:
    try:
        return float(item) if isinstance(item, int | float | str) else None
    except (ValueError, OverflowError):
        return None


def _name(prefix: str, taken: dict[str, str]) -> str:
    """Return a label that no other prefix has: its last parts, as many as are needed."""
    parts = Path(prefix).parts
    for count in range(1, len(parts) + 1):
        name = "/".join(parts[-count:])
        if name not in taken:
            break
    else:
        name = f"{prefix} ({len(taken)})"
    taken[name] = prefix
    return name
