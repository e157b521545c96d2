"""Other forms in which data sets keep conversations and tools, turned into OpenAI's."""

from collections.abc import Mapping
from typing import Any

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
}


def openai_messages(messages: Any) -> Any:  # Any: nested JSON, not checked yet
    """Return messages with role and content, where they are ShareGPT's with from and value.

    Raises:
        ValueError: when such a message is from somebody unknown.
    """
    if not (isinstance(messages, list) and messages and all(map(_is_sharegpt, messages))):
        return messages
    found = []
    for index, message in enumerate(messages):
        if message["from"] not in SHAREGPT_ROLES:
            raise ValueError(
                f"messages[{index}].from is {message['from']!r}; of ShareGPT's form only "
                f"{', '.join(SHAREGPT_ROLES)} are known: convert the row to role and content."
            )
        others = {key: value for key, value in message.items() if key not in ("from", "value")}
        role = SHAREGPT_ROLES[message["from"]]
        found.append({**others, "role": role, "content": message["value"]})
    return found


def _is_sharegpt(message: object) -> bool:
    return (
        isinstance(message, Mapping)
        and {"from", "value"} <= set(message)
        and ("role" not in message and isinstance(message["from"], str))
    )


def openai_tools(tools: Any) -> Any:  # Any: nested JSON, not checked yet
    """Return the list of tools that a table keeps as one object, or as an object of lists."""
    if not isinstance(tools, Mapping):
        return tools
    lists = [value for value in tools.values() if isinstance(value, list)]
    if len(lists) == len(tools) and len({len(value) for value in lists}) == 1:
        return [dict(zip(tools, row, strict=True)) for row in zip(*lists, strict=True)]
    return [tools] if tools else None
