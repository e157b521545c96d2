"""The base of every part of a recipe: strict, frozen, documented by the string under each field."""

from pydantic import BaseModel, ConfigDict


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
