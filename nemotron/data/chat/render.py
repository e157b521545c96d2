"""A conversation to text, with the spans of it that are trained on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from nemotron.data.chat.template import TEMPLATE, fill, load_template

Message = Mapping[str, Any]  # JSON: what a value is depends on its key
Effort = Literal["low", "efficient"]

ROLES = ("system", "user", "assistant", "tool")
TURN_TOKENS = ("<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation and the [start, stop) spans of characters that are trained on."""

    text: str
    supervised: tuple[tuple[int, int], ...]


def render(
    messages: Sequence[Message],
    tools: Sequence[Message] | None = None,
    *,
    enable_thinking: bool = True,
    truncate_history_thinking: bool = True,
    budget: int | None = None,
    effort: Effort | None = None,
    add_generation_prompt: bool = False,
) -> Rendered:
    """Write a conversation in Nemotron 3's chat format; all turns of the assistant are supervised.

    Messages and tools are OpenAI's, and pass `check_messages` unless they are a prompt, which needs
    no assistant. The prefix of an assistant's turn that inference gives to the model is not
    supervised; its `<|im_end|>` and line break are. `enable_thinking=False` takes all reasoning
    out, `truncate_history_thinking` that from before the last user message.
    """
    text, spans = fill(
        load_template(TEMPLATE),
        messages=[_with_parsed_arguments(message, index) for index, message in enumerate(messages)],
        tools=tools,
        enable_thinking=enable_thinking,
        truncate_history_thinking=truncate_history_thinking,
        reasoning_budget=budget,
        low_effort=effort == "low",
        medium_effort=effort == "efficient",
        add_generation_prompt=add_generation_prompt,
    )
    return Rendered(text, spans)


def training_sequences(
    messages: Sequence[Message],
    tools: Sequence[Message] | None = None,
    *,
    enable_thinking: bool = True,
    truncate_history_thinking: bool = True,
    budget: int | None = None,
    effort: Effort | None = None,
) -> list[Rendered]:
    """Split a conversation into the texts that a model is trained on.

    Without reasoning that is one text, with all of the assistant's turns supervised. With
    reasoning it is one text for each user message that the assistant answers: it ends with the
    last of these answers, and only they are supervised, since the reasoning of earlier ones is
    not what inference would show. What follows the assistant's last turn is left out.

    Raises:
        ValueError: as `check_messages` does.
    """
    check_messages(messages, tools)
    write = partial(
        render,
        tools=tools,
        enable_thinking=enable_thinking,
        truncate_history_thinking=truncate_history_thinking,
        budget=budget,
        effort=effort,
    )
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not enable_thinking or not any(_has_reasoning(messages[i]) for i in answers):
        return [write(messages[: answers[-1] + 1])]
    starts = [i for i, message in enumerate(messages) if message["role"] == "user"] or [0]
    sequences = []
    for start, stop in zip(starts, [*starts[1:], len(messages)], strict=True):
        own = [i for i in answers if start <= i < stop]
        if own:
            whole = write(messages[: own[-1] + 1])
            sequences.append(replace(whole, supervised=whole.supervised[-len(own) :]))
    return sequences


def check_messages(messages: object, tools: object = None) -> None:
    """Check that a row is a conversation that can be rendered and trained on.

    Raises:
        ValueError: with a sentence that names message and key, and says what would be right.
    """
    if not isinstance(messages, list) or not messages:
        found = "is empty" if messages == [] else f"is {_kind(messages)}"
        raise ValueError(f"messages {found}; give a list of at least one message.")
    _check_tools(tools)
    results_may_follow = False
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where} is {_kind(message)}; give an object with role and content.")
        _check_role(message.get("role"), where, is_first=index == 0)
        _check_content(message, where)
        _check_reasoning(message, where)
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
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError("messages has no assistant message; give at least one to train on.")


def _check_role(role: object, where: str, *, is_first: bool) -> None:
    if role not in ROLES:
        raise ValueError(f"{where}.role is {role!r}; give one of {', '.join(ROLES)}.")
    if role == "system" and not is_first:
        raise ValueError(f"{where}.role is system; only the first message can be that.")


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
                    f"{where}.content[{index}] is no text part; "
                    'give {"type": "text", "text": a string}.'
                )
    elif not isinstance(content, str):
        unless = "" if message["role"] != "assistant" else " (null only beside tool_calls)"
        raise ValueError(f"{where}.content is {_kind(content)}; give a string{unless}.")
    _refuse_turn_tokens(_text(message), f"{where}.content")


def _check_reasoning(message: Message, where: str) -> None:
    reasoning = message.get("reasoning_content")
    if reasoning is None:
        return
    if not isinstance(reasoning, str):
        raise ValueError(
            f"{where}.reasoning_content is {_kind(reasoning)}; give a string, or leave it out."
        )
    _refuse_turn_tokens(reasoning, f"{where}.reasoning_content")


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
                f"{here} names no function; "
                'give {"type": "function", "function": {"name": a string, "arguments": an object}}.'
            )
        written = json.dumps([function["name"], _arguments(function, here)], ensure_ascii=False)
        _refuse_turn_tokens(written, here)


def _check_tools(tools: object) -> None:
    if tools is None:
        return
    if not isinstance(tools, list):
        raise ValueError(f"tools is {_kind(tools)}; give a list of functions.")
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        function = _function(tool)
        if function is None:
            raise ValueError(
                f"{where} names no function; "
                'give {"type": "function", "function": {"name": a string, "parameters": a schema}}.'
            )
        if not _is_schema(function.get("parameters") or {}):
            raise ValueError(
                f"{where}: the parameters of {function['name']} are no JSON schema of an object; "
                'give {"type": "object", "properties": {a name: its schema}}.'
            )
        _refuse_turn_tokens(json.dumps(function, ensure_ascii=False, default=str), where)


def _refuse_turn_tokens(text: str, where: str) -> None:
    for token in TURN_TOKENS:
        if token in text:
            raise ValueError(
                f"{where} contains {token}, which would forge a turn; take it out of the text."
            )


def _with_parsed_arguments(message: Message, index: int) -> Message:
    """Return the message with the arguments of its calls as mappings: the template reads those."""
    calls = []
    for position, call in enumerate(message.get("tool_calls") or []):
        function = call.get("function", call)
        arguments = _arguments(function, f"messages[{index}].tool_calls[{position}]")
        calls.append({"function": {**function, "arguments": arguments}})
    return {**message, "tool_calls": calls}


def _arguments(function: Message, where: str) -> Mapping[str, Any]:
    """Return the arguments of a call, which OpenAI sends as the JSON text of an object."""
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    if not isinstance(arguments, Mapping):
        raise ValueError(
            f"{where}: the arguments of {function.get('name')} are no JSON object; "
            "give one, or its text."
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


def _has_reasoning(message: Message) -> bool:
    """Say whether an assistant's message has reasoning, in its own key or inside its text."""
    inline = _text(message).rpartition("</think>")[0].replace("<think>", "")
    return any(text.strip() for text in (message.get("reasoning_content") or "", inline))


def _text(message: Message) -> str:
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
