"""The values of a recipe as one table: dotted keys, and each value as the YAML of a line."""

import json
from collections.abc import Mapping
from typing import Any


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return every value by its dotted key; a list is one value."""
    result: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value_text(value)
    return result


def value_text(value: Any) -> str:
    """Return the value as YAML that reads back as itself."""
    if isinstance(value, float):
        return repr(value).replace("inf", ".inf")
    text = json.dumps(value, ensure_ascii=False)
    return text.replace("Infinity", ".inf")
