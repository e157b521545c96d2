"""Strict reading of a checkpoint's JSON files: every key is known, present and of its type."""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from nemotron.errors import UserError
from nemotron.files import read_regular

T = TypeVar("T")

MAX_BYTES = 1 << 28
"""Largest JSON file that is read; an index of a million pieces has less."""


class DamagedCheckpoint(Exception):
    """Says in one clause what is wrong with a checkpoint folder."""


def read_record(path: Path, kind: type[T]) -> T:
    """Return the content of a JSON file as a validated record.

    Raises:
        DamagedCheckpoint: naming the file and the key that is unknown, absent or of another type.
    """
    try:
        content = read_regular(path, MAX_BYTES)
    except OSError as error:
        raise DamagedCheckpoint(f"{path.name} cannot be read: {error.strerror}") from None
    except UserError as error:
        raise DamagedCheckpoint(str(error).partition(";")[0]) from None
    try:
        return TypeAdapter(kind).validate_json(content)
    except ValidationError as error:
        raise DamagedCheckpoint(f"{path.name}: {explain(error)}") from None


def explain(error: ValidationError) -> str:
    """Return a clause about the first problem, with its key and value."""
    problem = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in problem["loc"]) or "the content"
    if problem["type"] == "missing":
        return f"{key} is missing"
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{key} is an unknown key"
    if problem["type"] == "json_invalid":
        return f"it is not valid JSON ({problem['ctx']['error']})"
    rule = problem["msg"].replace("Input should", "must").removeprefix("Value error, ")
    return f"{key} = {_short(problem['input'])} {rule}"


def _short(value: Any) -> str:  # Any: JSON of the wrong type
    # repr of a long or nested value would cost what it was refused for
    if isinstance(value, dict | list):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    text = repr(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."
