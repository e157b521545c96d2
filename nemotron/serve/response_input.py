"""The items of a request to the Responses interface as messages of a conversation."""

from collections.abc import Mapping, Sequence
from typing import Any

from nemotron.serve.errors import ApiError

Json = dict[str, Any]  # Any: JSON
KINDS = "message, reasoning, function_call or function_call_output"
TEXTS = ("input_text", "output_text", "reasoning_text", "text")


def messages_of(given: str | Sequence[Mapping[str, Any]], instructions: str | None) -> list[Json]:
    """Return the messages that a request gives; `Any` is JSON.

    Reasoning, text and calls that follow each other are one message of the assistant. Instructions
    stand before a system message.

    Raises:
        ApiError: when an item is of no known kind.
    """
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    messages: list[Json] = []
    for place, item in enumerate(items):
        _add(messages, item, f"input[{place}]")
    if not instructions:
        return messages
    if messages and messages[0]["role"] in ("system", "developer"):
        instructions += "\n\n" + str(messages.pop(0)["content"])
    return [{"role": "system", "content": instructions}, *messages]


def _add(messages: list[Json], item: Mapping[str, Any], where: str) -> None:
    kind = item.get("type", "message")
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if kind == "message" and item.get("role") == "assistant":
        text = _text(item.get("content"), f"{where}.content")
        if last is not None and last.keys() == {"role", "content", "reasoning_content"}:
            last["content"] += text
        else:
            messages.append({"role": "assistant", "content": text})
    elif kind == "message":
        text = _text(item.get("content"), f"{where}.content")
        messages.append({"role": item.get("role"), "content": text})
    elif kind == "reasoning":
        text = _text(item.get("content") or [], f"{where}.content")
        messages.append({"role": "assistant", "content": "", "reasoning_content": text})
    elif kind == "function_call":
        if last is None:
            messages.append(last := {"role": "assistant", "content": ""})
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        last.setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        text = _text(item.get("output"), f"{where}.output")
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": text})
    else:
        raise _wrong(f"{where}.type = {str(kind)[:40]!r} is not known here; give {KINDS}.")


def _text(content: object, where: str) -> str:
    """Return the text of a content, which is a string or a list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _wrong(f"{where} is neither a string nor a list of parts; give one of them.")
    texts = []
    for place, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) and part.get("type") in TEXTS else None
        if not isinstance(text, str):
            raise _wrong(
                f"{where}[{place}] is not a part of text; give "
                '{"type": "input_text", "text": a string}.'
            )
        texts.append(text)
    return "".join(texts)


def _wrong(sentence: str) -> ApiError:
    return ApiError(400, sentence, param="input")
