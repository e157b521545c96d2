"""Whether a row is a conversation that can be rendered and trained on."""

import json
from collections.abc import Mapping
from typing import Any

Message = Mapping[str, Any]  # JSON: what a value is depends on its key

ROLES = ("system", "user", "assistant", "tool")
TURN_TOKENS = ("<|im_start|>", "<|im_end|>")


def check_messages(messages: object, tools: object = None) -> None:
    """Check that a row is a conversation that can be rendered and trained on.

    Raises:
        ValueError: with a sentence that names message and key, and says what would be right.
    """
    check_prompt(messages, tools)
    assert isinstance(messages, list)
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError("messages has no assistant message; give at least one to train on.")


def check_prompt(messages: object, tools: object = None) -> None:
    """Check that a conversation can be rendered; it may lack an answer.

    Raises:
        ValueError: as `check_messages` does.
    """
    if not isinstance(messages, list) or not messages:
        found = "is empty" if messages == [] else f"is {_kind(messages)}"
        raise ValueError(f"messages {found}; give a list of at least one message.")
    check_tools(tools)
    results_may_follow = False
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where} is {_kind(message)}; give an object with role and content.")
        _check_role(message.get("role"), where, is_first=index == 0)
        _check_content(message, where)
        _check_reasoning(message, where)
        _check_weight(message, where)
        if message["role"] == "tool" and not results_may_follow:
            raise ValueError(
                f"{where}.role is tool, but no assistant message with tool_calls comes before it; "
                "put the call before its result."
            )
        if message.get("tool_calls"):
            _check_calls(message, where)
            if not tools:
                raise ValueError(
                    f"{where}.tool_calls is given, but the tools of the row are missing; "
                    "give the list of functions that could be called."
                )
        if message["role"] != "tool":
            results_may_follow = bool(message.get("tool_calls"))


def _check_role(role: object, where: str, *, is_first: bool) -> None:
    if role not in ROLES:
        raise ValueError(f"{where}.role is {role!r}; give one of {', '.join(ROLES)}.")
    if role == "system" and not is_first:
        raise ValueError(f"{where}.role is system; only the first message may have this role.")


def _check_content(message: Message, where: str) -> None:
    content = message.get("content")
    if content is None and message["role"] == "assistant" and message.get("tool_calls"):
        return
    if isinstance(content, list):
        for index, part in enumerate(content):
            if (
                not isinstance(part, Mapping)
                or part.get("type") != "text"
                or not isinstance(part.get("text"), str)
            ):
                raise ValueError(
                    f"{where}.content[{index}] is not a text part; "
                    'give {"type": "text", "text": a string}.'
                )
    elif not isinstance(content, str):
        unless = "" if message["role"] != "assistant" else " (null only beside tool_calls)"
        raise ValueError(f"{where}.content is {_kind(content)}; give a string{unless}.")
    _refuse_turn_tokens(text_of(message), f"{where}.content")


def _check_reasoning(message: Message, where: str) -> None:
    reasoning = message.get("reasoning_content")
    if reasoning is None:
        return
    if not isinstance(reasoning, str):
        raise ValueError(
            f"{where}.reasoning_content is {_kind(reasoning)}; give a string, or leave it out."
        )
    _refuse_turn_tokens(reasoning, f"{where}.reasoning_content")


def _check_weight(message: Message, where: str) -> None:
    weight, train = message.get("weight"), message.get("train")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise ValueError(f"{where}.weight is {weight!r}; give 0 (not learned) or 1.")
    if train is not None and not isinstance(train, bool):
        raise ValueError(f"{where}.train is {train!r}; give true or false.")


def is_learned(message: Message) -> bool:
    """Say whether an assistant's message is to be learned: `weight` 0 and `train` false say no."""
    return message.get("weight") in (None, 1) and message.get("train") is not False


def _check_calls(message: Message, where: str) -> None:
    calls = message["tool_calls"]
    if message["role"] != "assistant":
        raise ValueError(
            f"{where}.tool_calls is given for the role {message['role']}; only assistant can call."
        )
    if not isinstance(calls, list):
        raise ValueError(f"{where}.tool_calls is {_kind(calls)}; give a list of calls.")
    for index, call in enumerate(calls):
        here = f"{where}.tool_calls[{index}]"
        function = _function(call)
        if function is None:
            raise ValueError(
                f"{here} does not name a function; "
                'give {"type": "function", "function": {"name": a string, "arguments": an object}}.'
            )
        written = json.dumps([function["name"], call_arguments(function, here)], ensure_ascii=False)
        _refuse_turn_tokens(written, here)


def check_tools(tools: object) -> None:
    """Check that tools, if there are any, are functions that the template can write.

    Raises:
        ValueError: as `check_messages` does.
    """
    if tools is None:
        return
    if not isinstance(tools, list):
        raise ValueError(f"tools is {_kind(tools)}; give a list of functions.")
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        function = _function(tool)
        if function is None:
            raise ValueError(
                f"{where} does not name a function; "
                'give {"type": "function", "function": {"name": a string, "parameters": a schema}}.'
            )
        if not _is_schema(function.get("parameters") or {}):
            raise ValueError(
                f"{where}: the parameters of {function['name']} are not a JSON schema of an "
                "object; "
                'give {"type": "object", "properties": {a name: its schema}}.'
            )
        _refuse_turn_tokens(json.dumps(function, ensure_ascii=False, default=str), where)


def _refuse_turn_tokens(text: str, where: str) -> None:
    for token in TURN_TOKENS:
        if token in text:
            raise ValueError(
                f"{where} contains {token}, which marks the bounds of a turn; remove it from the "
                "text."
            )


def call_arguments(function: Message, where: str) -> Mapping[str, Any]:
    """Return the arguments of a call, which OpenAI sends as the JSON text of an object.

    Raises:
        ValueError: when they are none.
    """
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except RecursionError:
            rule = f"the arguments of {function.get('name')} are nested too deep; write them flat."
            raise ValueError(f"{where}: {rule}") from None
        except ValueError:
            arguments = None
    if not isinstance(arguments, Mapping):
        raise ValueError(
            f"{where}: the arguments of {function.get('name')} are not a JSON object; "
            "give an object, or its JSON text."
        )
    return arguments


def _function(entry: object) -> Message | None:
    """Return the function that a tool or a call names, bare or under `function`, if it does."""
    function = entry.get("function", entry) if isinstance(entry, Mapping) else None
    if isinstance(function, Mapping) and isinstance(function.get("name"), str):
        return function if function["name"] else None
    return None


def _is_schema(parameters: object) -> bool:
    """Say whether a function's parameters have the form that the template writes."""
    properties = (parameters.get("properties") or {}) if isinstance(parameters, Mapping) else None
    return isinstance(properties, Mapping) and all(
        isinstance(field, Mapping) for field in properties.values()
    )


def text_of(message: Message) -> str:
    """Return the content of a message as one text, however it is given."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _kind(value: object) -> str:
    """Name what a value is in the words of JSON."""
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
        type(None): "null",
    }
    return names.get(type(value), f"a Python {type(value).__name__}")
