"""A conversation to text, with the spans of it that are trained on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from nemotron.data.chat.check import Message, call_arguments, check_messages, is_learned, text_of
from nemotron.data.chat.foreign import ForeignTemplate
from nemotron.data.chat.template import TEMPLATE, fill, load_template

Effort = Literal["low", "efficient"]


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
    template: ForeignTemplate | None = None,
) -> Rendered:
    """Write a conversation in Nemotron 3's chat format; all turns of the assistant are supervised.

    Messages and tools are OpenAI's, and pass `check_messages` unless they are a prompt, which needs
    no assistant. The prefix of an assistant's turn that inference gives to the model is not
    supervised; its `<|im_end|>` and line break are. `enable_thinking=False` takes all reasoning
    out, `truncate_history_thinking` that from before the last user message. Another model may bring
    a `template` of its own, in whose text nothing is known to be supervised.

    Raises:
        TemplateError: when a template of another model refuses the conversation, or is damaged.
    """
    values = {
        "messages": [_with_parsed_arguments(m, index) for index, m in enumerate(messages)],
        "tools": tools,
        "enable_thinking": enable_thinking,
        "truncate_history_thinking": truncate_history_thinking,
        "reasoning_budget": budget,
        "low_effort": effort == "low",
        "medium_effort": effort == "efficient",
        "add_generation_prompt": add_generation_prompt,
    }
    if template is not None:
        return Rendered(template.fill(**values), ())
    text, spans = fill(load_template(TEMPLATE), **values)
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
    not what inference would show. What follows the assistant's last turn is left out, and a turn
    with `weight: 0` or `train: false` is not supervised.

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
        return [_learned_only(write(messages[: answers[-1] + 1]), [messages[i] for i in answers])]
    starts = [i for i, message in enumerate(messages) if message["role"] == "user"] or [0]
    sequences = []
    for start, stop in zip(starts, [*starts[1:], len(messages)], strict=True):
        own = [i for i in answers if start <= i < stop]
        if own:
            whole = write(messages[: own[-1] + 1])
            last = replace(whole, supervised=whole.supervised[-len(own) :])
            sequences.append(_learned_only(last, [messages[i] for i in own]))
    return sequences


def _learned_only(rendered: Rendered, answers: Sequence[Message]) -> Rendered:
    """Keep the spans of the answers that are to be learned."""
    spans = zip(rendered.supervised, answers, strict=True)
    return replace(rendered, supervised=tuple(span for span, m in spans if is_learned(m)))


def _with_parsed_arguments(message: Message, index: int) -> Message:
    """Return the message with the arguments of its calls as mappings: the template reads those."""
    calls = []
    for position, call in enumerate(message.get("tool_calls") or []):
        function = call.get("function", call)
        arguments = call_arguments(function, f"messages[{index}].tool_calls[{position}]")
        calls.append({"function": {**function, "arguments": arguments}})
    return {**message, "tool_calls": calls}


def _has_reasoning(message: Message) -> bool:
    """Say whether an assistant's message has reasoning, in its own key or inside its text."""
    inline = text_of(message).rpartition("</think>")[0].replace("<think>", "")
    return any(text.strip() for text in (message.get("reasoning_content") or "", inline))
