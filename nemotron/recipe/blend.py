"""Blend files that a recipe names: read, and put where the recipe names them."""

import json
import os
from pathlib import Path
from typing import Any

from nemotron.data.blend import is_megatron_blend, read_megatron_blend
from nemotron.data.config import BlendConfig
from nemotron.errors import UserError
from nemotron.recipe.read import Document, Path_, read_yaml_values

KEYS = tuple(BlendConfig.model_fields)


def insert_blends(document: Document, folder: Path) -> None:
    """Replace every `blend: FILE` by what the file holds; paths are relative to `folder`.

    Under `data` the keys of the file take the place of `blend`; under a phase or a length they
    stand below it. The files that were read are in `document.places`.
    """
    _insert(document, document.values, (), folder)


def read_blend(path: Path) -> Document:
    """Read a blend file, ours or Megatron's, as the keys of `BlendConfig`.

    Raises:
        UserError: when it is neither.
    """
    is_json = path.suffix == ".json"
    document = Document(_read_json(path)) if is_json else read_yaml_values(path)
    content: Any = document.values
    if is_megatron_blend(content):
        return Document(read_megatron_blend(content, str(path)))
    if not isinstance(content, dict) or "sources" not in content:
        raise UserError(
            f"{path} is no blend; it must have the key sources, or be a list of weights and "
            "prefixes as Megatron reads it."
        )
    if unknown := [key for key in content if key not in KEYS]:
        raise UserError(
            f"{document.places.get((unknown[0],), path)}: the key {unknown[0]} is unknown in a "
            f"blend; known are {', '.join(KEYS)}."
        )
    return document


def _insert(document: Document, values: Any, path: Path_, folder: Path) -> None:
    if isinstance(values, list):
        for index, item in enumerate(values):
            _insert(document, item, (*path, str(index)), folder)
        return
    if not isinstance(values, dict) or path[:1] not in ((), ("data",), ("phases",)):
        return
    named = values.get("blend")
    if isinstance(named, str):
        place = document.places.get((*path, "blend"), "recipe")
        if both := [key for key in KEYS if key in values]:
            raise UserError(f"{place}: blend and {both[0]} are both given; keep one of them.")
        found = read_blend(Path(os.path.normpath(folder / named)))
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
            document.places[(*at, key)] = place
        document.places.update({(*at, *key): line for key, line in found.places.items()})
    for key, item in values.items():
        _insert(document, item, (*path, key), folder)


def _read_json(path: Path) -> Any:  # Any: nested JSON
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; name an existing blend.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}; correct the JSON there.") from None
