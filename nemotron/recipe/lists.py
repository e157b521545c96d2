"""Single items where a list is meant, as in `trackers: wandb`."""

from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel


def wrap_single_items(values: Any, section: type[BaseModel]) -> Any:  # Any: not yet validated
    """Return the values of a section, with lists of one where it takes a list and has an item."""
    if not isinstance(values, dict):
        return values
    return {key: _wrap(value, section, key) for key, value in values.items()}


def _wrap(value: Any, section: type[BaseModel], key: str) -> Any:
    field = section.model_fields.get(key)
    if field is None or value is None:
        return value
    forms = _alternatives(field.annotation)
    value = _as_list(value, forms)
    inner = [item for form in forms for item in (form, *get_args(form)) if _is_section(item)]
    if not inner:
        return value
    if isinstance(value, list | tuple):
        return [wrap_single_items(item, inner[0]) for item in value]
    return wrap_single_items(value, inner[0])


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
