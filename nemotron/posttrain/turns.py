"""Conversations in which a model calls tools, many of them at a time."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nemotron.data.chat.calls import Call, read_calls
from nemotron.generate.sampling import Sampling
from nemotron.posttrain.answering import Answerer, Asked
from nemotron.posttrain.environments.base import (
    Environment,
    Response,
    Row,
    messages_of,
    params_of,
)

MAX_TURNS = 16
"""Answers of the model in one conversation; one that calls tools in the last of them ends there."""
STRIDE = 1 << 32
"""What is added to the seed from one turn to the next: more than any number of samples."""


@dataclass
class Conversation:
    """A conversation as far as it goes."""

    environment: Environment
    row: Row
    sampling: Sampling
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    state: Any  # Any: JSON, what the environment makes of it
    items: list[dict[str, Any]] = field(default_factory=list)
    """What was said and called, as items of OpenAI's Responses format."""
    num_tokens: int = 0
    response: Response = field(default_factory=lambda: Response(""))
    is_over: bool = False

    @classmethod
    def begin(cls, environment: Environment, row: Row, sampling: Sampling) -> "Conversation":
        """Return one of which the model has not said anything."""
        tools = [dict(tool) for tool in params_of(row).get("tools") or []]
        return cls(environment, row, sampling, messages_of(row), tools, environment.seed(row))

    def take(self, response: Response, num_tokens: int, turn: int) -> None:
        """Take in an answer of the model: run its calls, or end the conversation."""
        self.num_tokens += num_tokens
        text, calls = read_calls(response.text, self.tools)
        if response.reasoning:
            self.items.append({"type": "reasoning", "summary": [], "text": response.reasoning})
        if text or not calls:
            content = [{"type": "output_text", "text": text}]
            self.items.append({"type": "message", "content": content})
        said = [self._run(call, f"call_{turn}_{place}") for place, call in enumerate(calls)]
        # without tools of its own, an environment judges the arguments alone
        runs = bool(self.environment.tools(self.row)) and self.state is not None
        if calls and runs and not response.is_truncated and turn + 1 < MAX_TURNS:
            self._go_on(text, response.reasoning, calls, said)
            return
        self.is_over = True
        self.response = replace(response, text=text, output=tuple(self.items))

    def _run(self, call: Call, call_id: str) -> str:
        self.items.append(
            {
                "type": "function_call",
                "name": call.name,
                "arguments": json.dumps(dict(call.arguments)),
                "call_id": call_id,
            }
        )
        said = self.environment.call(self.state, call.name, dict(call.arguments))
        self.items.append({"type": "function_call_output", "call_id": call_id, "output": said})
        return said

    def _go_on(self, text: str, reasoning: str, calls: Sequence[Call], said: Sequence[str]) -> None:
        """Add a turn with calls, and what the tools answered."""
        wanted = [
            {"type": "function", "function": {"name": c.name, "arguments": dict(c.arguments)}}
            for c in calls
        ]
        turn = {"role": "assistant", "content": text, "tool_calls": wanted}
        if reasoning:
            turn["reasoning_content"] = reasoning
        self.messages.append(turn)
        self.messages += [{"role": "tool", "content": each} for each in said]


def converse(
    answerer: Answerer,
    rows: Sequence[tuple[Environment, Row]],
    sampling: Sequence[Sampling],
) -> list[Conversation]:
    """Let a model talk about each row with its tools until it calls none of them.

    `max_new_tokens` limits each answer, `MAX_TURNS` their number.
    """
    talks = [
        Conversation.begin(environment, row, how)
        for (environment, row), how in zip(rows, sampling, strict=True)
    ]
    for turn in range(MAX_TURNS):
        open_ = [talk for talk in talks if not talk.is_over]
        answers = answerer.answer([_ask(answerer, talk, turn) for talk in open_])
        for talk, answer in zip(open_, answers, strict=True):
            is_truncated = answer.finish == "length"
            response = answerer.prompts.response(answer.tokens, is_truncated=is_truncated)
            talk.take(response, len(answer.tokens), turn)
    return talks


def _ask(answerer: Answerer, talk: Conversation, turn: int) -> Asked:
    prompt = answerer.prompts.write(talk.messages, talk.tools)
    seed = talk.sampling.seed
    seed = None if seed is None else (seed + turn * STRIDE) % 2**63
    return Asked(prompt, replace(talk.sampling, seed=seed))
