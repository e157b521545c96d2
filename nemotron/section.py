"""The base of every part of a recipe: strict, frozen, documented by the string under each field."""

from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """A validated part of a recipe; unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _wrap_lists_of_one(cls, values: Any) -> Any:  # Any: not yet validated
        """Take a single item where a list is meant, as in `trackers: wandb`."""
        if not isinstance(values, dict):
            return values
        return {key: _as_list(value, cls, key) for key, value in values.items()}


def _as_list(value: Any, section: type[BaseModel], key: str) -> Any:
    field = section.model_fields.get(key)
    if field is None or value is None or isinstance(value, list | tuple):
        return value
    forms = _alternatives(field.annotation)
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
