"""Blends as Megatron writes them: lists of weights and prefixes, for each split."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemotron.errors import UserError

SPLITS = ("train", "valid", "validation", "test")


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
        UserError: when it is no such list.
    """
    splits = content if isinstance(content, Mapping) else {"train": content}
    if unknown := [name for name in splits if name not in SPLITS]:
        raise UserError(f"{place}: {unknown[0]!r} is no split; known are {', '.join(SPLITS)}.")
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
        raise UserError(f"{place}: train is empty; list weights and prefixes.")
    return {"sources": sources, "validation": held_out}


def _pairs(items: Sequence[Any], place: str) -> list[tuple[float, str]]:
    if all(isinstance(item, str) and _number(item) is None for item in items):
        return [(1.0, str(item)) for item in items]
    if len(items) % 2:
        raise UserError(
            f"{place} has {len(items)} entries; write weight and prefix in turn, or prefixes alone."
        )
    pairs = []
    for at in range(0, len(items), 2):
        weight, prefix = _number(items[at]), items[at + 1]
        if weight is None or not weight > 0 or not isinstance(prefix, str):
            raise UserError(
                f"{place}, entries {at} and {at + 1}: {items[at]!r}, {prefix!r} must be a weight "
                "above 0 and the path of a shard without its ending."
            )
        pairs.append((weight, prefix))
    return pairs


def _number(item: object) -> float | None:
    try:
        return float(item) if isinstance(item, int | float | str) else None
    except ValueError:
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
