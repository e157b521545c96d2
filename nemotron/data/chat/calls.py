"""Calls of functions in an answer: the inverse of what the chat template writes."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemotron.data.chat.check import Message

CALL = "<tool_call>"
"""What stands before every call."""

_BLOCK = re.compile(r"<tool_call>\s*<function=([^>\s]+)>(.*?)</function>\s*</tool_call>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """A function and the values of its parameters."""

    name: str
    arguments: Mapping[str, Any]  # Any: JSON


def begin_call(name: str | None = None) -> str:
    """Return how an answer begins that is nothing but a call, of the function `name` if given."""
    return f"\n{CALL}\n<function=" + ("" if name is None else f"{name}>\n")


def read_calls(text: str, tools: Sequence[Message]) -> tuple[str, list[Call]]:
    """Return an answer's text before its first call, and its calls.

    A block that is not closed, or calls a function that is not among the tools, is text as it
    stands. A value is what its parameter's schema says, if it can be read so, else its text.
    """
    schemas = {}
    for tool in tools:
        function = tool.get("function", tool)
        schemas[function["name"]] = (function.get("parameters") or {}).get("properties") or {}
    found = [match for match in _BLOCK.finditer(text) if match[1] in schemas]
    if not found:
        return text, []
    calls = [
        Call(
            match[1],
            {
                key: _value(value, schemas[match[1]].get(key, {}).get("type"))
                for key, value in _PARAMETER.findall(match[2])
            },
        )
        for match in found
    ]
    return text[: found[0].start()].rstrip(), calls


def _value(text: str, types: object) -> Any:  # Any: JSON
    """Return the value that a parameter's text stands for; the template writes True for true."""
    named = types if isinstance(types, list) else [types]
    if "string" in named:
        return text
    if named == [None] and not text.lstrip().startswith(("[", "{")):
        return text
    words = {"true": True, "false": False, "none": None, "null": None}
    if (word := text.strip().lower()) in words:
        return words[word]
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
