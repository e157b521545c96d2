"""Pairs of answers to one prompt, in the forms in which data sets keep them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemotron.data.chat.check import Message
from nemotron.data.chat.forms import openai_messages
from nemotron.data.chat.render import Rendered, training_sequences

Json = Any  # what a row holds


@dataclass(frozen=True)
class Preference:
    """Messages that both answers follow, and the messages of each answer."""

    prompt: Sequence[Message]
    chosen: Sequence[Message]
    rejected: Sequence[Message]

    def render(
        self,
        tools: Sequence[Message] | None,
        *,
        enable_thinking: bool,
        truncate_history_thinking: bool,
    ) -> tuple[Rendered, Rendered]:
        """Return the chosen and the rejected conversation; of each the answer alone is supervised.

        Raises:
            ValueError: when one of them is not a conversation.
        """
        # what the assistant said before is part of the prompt
        before = [{**m, "weight": 0} if m.get("role") == "assistant" else m for m in self.prompt]
        chosen, rejected = (
            training_sequences(
                [*before, *answer],
                tools,
                enable_thinking=enable_thinking,
                truncate_history_thinking=truncate_history_thinking,
            )[-1]
            for answer in (self.chosen, self.rejected)
        )
        return chosen, rejected


def preference_of(prompt: Json, chosen: Json, rejected: Json) -> Preference:
    """Read a pair: TRL's forms, with messages or text and with or without a prompt of their own.

    An answer that begins with a message of somebody else than the assistant is a whole
    conversation; what both have in common at their beginning is then the prompt.

    Raises:
        ValueError: when the row is none of these, in one sentence.
    """
    answers = {"chosen": _messages(chosen, "chosen"), "rejected": _messages(rejected, "rejected")}
    whole = {name: _is_whole(messages) for name, messages in answers.items()}
    if whole["chosen"] != whole["rejected"]:
        raise ValueError(
            "one of chosen and rejected is a whole conversation and the other is an answer; give "
            "both in the same form."
        )
    if whole["chosen"]:
        start = _common(answers["chosen"], answers["rejected"])
        before = answers["chosen"][:start]
        answers = {name: messages[start:] for name, messages in answers.items()}
    else:
        before = _prompt(prompt)
    if not before or before[-1].get("role") == "assistant":
        raise ValueError(
            "the prompt does not end with a message of the user or a tool; give what both answers "
            "follow."
        )
    for name, messages in answers.items():
        _check_answer(messages, name)
    return Preference(before, answers["chosen"], answers["rejected"])


def _prompt(prompt: Json) -> list[Message]:
    if isinstance(prompt, str):
        parsed = _parsed(prompt)
        prompt = parsed if isinstance(parsed, list) else [{"role": "user", "content": prompt}]
    if prompt is None:
        raise ValueError(
            "the prompt is absent, and chosen and rejected are not whole conversations."
        )
    prompt = openai_messages(prompt)
    if not isinstance(prompt, list) or not all(isinstance(m, Mapping) for m in prompt):
        raise ValueError("prompt is neither a list of messages nor text; give one of them.")
    return prompt


def _messages(value: Json, name: str) -> list[Message]:
    if isinstance(value, str):
        parsed = _parsed(value)
        value = parsed if isinstance(parsed, list) else [{"role": "assistant", "content": value}]
    messages = openai_messages(value)
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{name} is not a list of messages, nor text; give the answer.")
    if not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(f"{name} is not a list of messages; give objects with role and content.")
    return messages


def _parsed(text: str) -> Json:
    """Return what JSON text holds; data sets often keep nested values as text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _is_whole(messages: Sequence[Message]) -> bool:
    return messages[0].get("role") != "assistant"


def _common(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """Return how many messages both begin with; the last one of each is an answer in any case."""
    most = min(len(chosen), len(rejected)) - 1
    start = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    while start and chosen[start - 1].get("role") == "assistant":
        start -= 1
    return start


def _check_answer(messages: Sequence[Message], name: str) -> None:
    for message in messages:
        if message.get("role") not in ("assistant", "tool"):
            raise ValueError(
                f"{name} has a message of the role {message.get('role')!r}; an answer has those of "
                "the assistant and of tools."
            )
