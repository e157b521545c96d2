"""Conversations in which tasks of environments are answered, to learn the form from."""

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from nemotron.errors import UserError
from nemotron.files import write_text
from nemotron.posttrain.environments.base import Response, Row, level_problem, messages_of
from nemotron.posttrain.environments.registry import ENVIRONMENTS, find_environment
from nemotron.posttrain.holding_out import draw_rows

REASONING = "reasoning_content"
"""Key of a message's reasoning."""


@runtime_checkable
class Demonstrates(Protocol):
    """An environment that knows how its own tasks are answered."""

    def demonstrate(self, row: Row) -> Response:
        """Return a right answer, with the reasoning that leads to it."""
        ...


@runtime_checkable
class Errs(Demonstrates, Protocol):
    """An environment that knows answers as well that earn nothing, such as people give."""

    def mistake(self, row: Row, rng: random.Random) -> Response:
        """Return an answer that is wrong or in a form that is not accepted, with reasoning."""
        ...


@dataclass(frozen=True)
class Manner:
    """How tasks are answered, and how that is written."""

    thinking: bool = True
    """Whether the reasoning is written, too."""
    is_text: bool = False
    """Whether prompt and answer are one text without a chat format, as pre-training reads it."""
    mistakes: float = 0.0
    """Share of the answers that earn nothing."""
    held_out_fraction: float = 0.0
    """Share of the tasks that are left out, those that a recipe with the same fraction leaves to
    evaluations."""


@dataclass(frozen=True)
class TaskSet:
    """Tasks of one environment and difficulty."""

    environment: str
    level: float = 0.0
    tools: bool = False
    """Whether the environment's option `tools` is on."""

    @classmethod
    def read(cls, text: str) -> "TaskSet":
        """Read `NAME` or `NAME@LEVEL`, with `+tools` at its end or not.

        Raises:
            UserError: when the level is not a number from 0.
        """
        plain = text.removesuffix("+tools")
        name, at, level = plain.partition("@")
        try:
            value = float(level if at else 0)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            rule = f"has no level from 0 behind the @; write {name}@1."
            raise UserError(rule, key=repr(text))
        return cls(name, value, tools=plain != text)


def write_chats(
    sets: Sequence[TaskSet], out: Path, *, count: int, seed: int, manner: Manner
) -> int:
    """Write `count` conversations of each set, mixed; return how many.

    They are rows with `messages`, or with `text`.

    Raises:
        UserError: when an environment is unknown, cannot run here, has no answers of its own, or
            too few tasks that are not held out.
    """
    rows = itertools.chain.from_iterable(chats(each, count, seed, manner) for each in sets)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    random.Random(seed).shuffle(lines)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "".join(lines))
    return len(lines)


def chats(tasks: TaskSet, count: int, seed: int, manner: Manner) -> Iterator[dict[str, Any]]:
    """Yield conversations of a set, as rows of JSON.

    Raises:
        UserError: as `write_chats`.
    """
    environment = find_environment(tasks.environment, {"tools": True} if tasks.tools else {})
    if problem := level_problem(environment, tasks.level):
        raise UserError(problem, key=repr(f"{tasks.environment}@{tasks.level:g}"))
    needed = Errs if manner.mistakes else Demonstrates
    if not isinstance(environment, needed):
        able = [name for name, kind in ENVIRONMENTS.items() if issubclass(kind, needed)]
        what = "make mistakes" if manner.mistakes else "answer its own tasks"
        raise UserError(f"{tasks.environment} does not {what}; choose from {', '.join(able)}.")
    rng = random.Random(f"{seed} mistakes of {tasks.environment} {tasks.level}")
    fraction = manner.held_out_fraction
    for row in draw_rows(environment, count, seed, tasks.level, fraction, held=False):
        answer = environment.demonstrate(row)
        if manner.mistakes and rng.random() < manner.mistakes:
            assert isinstance(environment, Errs)
            answer = environment.mistake(row, rng)
        chat = _written(messages_of(row), answer, manner)
        tools = environment.tools(row)
        yield {**chat, "tools": tools} if tools and not manner.is_text else chat


def _written(
    prompt: list[dict[str, Any]], answer: Response, manner: Manner
) -> dict[str, Any]:  # Any: a row of JSON
    has_reasoning = manner.thinking and answer.reasoning
    if manner.is_text:
        reasoning = f"{answer.reasoning}\n" if has_reasoning else ""
        return {"text": f"{prompt[-1]['content']}{reasoning}{answer.text}"}
    turns = _turns(answer)
    for turn in turns:
        if not has_reasoning:
            turn.pop(REASONING, None)
    return {"messages": [*prompt, *turns]}


def _turns(answer: Response) -> list[dict[str, Any]]:
    """Return the turns of an answer: each call, what the tool says, and the last message.

    A call without reasoning of its own has that of the last message.
    """
    turns: list[dict[str, Any]] = []
    thought = answer.reasoning
    for item in answer.output:
        if item["type"] == "reasoning":
            thought = item["text"]
        elif item["type"] == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"type": "function", "function": function}
            turn = {"role": "assistant", "content": "", "tool_calls": [call]}
            turns.append({**turn, REASONING: thought})
            thought = answer.reasoning
        elif item["type"] == "function_call_output":
            turns.append({"role": "tool", "content": item["output"]})
    return [*turns, {"role": "assistant", "content": answer.text, REASONING: answer.reasoning}]
