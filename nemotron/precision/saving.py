"""Quantized operands for autograd to keep: only tensors given to it can be freed or recomputed."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where a tensor is in the list."""

    index: int


def take_out(value: T, tensors: list[Tensor]) -> T:
    """Return a dataclass with places instead of its tensors, which are put at the list's end."""
    changes: dict[str, Any] = {}
    for name, held in _held(value):
        if isinstance(held, Tensor):
            changes[name] = Place(len(tensors))
            tensors.append(held)
        elif is_dataclass(held):
            changes[name] = take_out(held, tensors)
    return replace(value, **changes)  # type: ignore[type-var]


def put_back(value: T, tensors: Sequence[Tensor]) -> T:
    """Return the dataclass that `take_out` was given."""
    changes: dict[str, Any] = {}
    for name, held in _held(value):
        if isinstance(held, Place):
            changes[name] = tensors[held.index]
        elif is_dataclass(held):
            changes[name] = put_back(held, tensors)
    return replace(value, **changes)  # type: ignore[type-var]


def _held(value: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(value, field.name)) for field in fields(value)]
