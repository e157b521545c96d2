"""Conversations in which tasks of environments are answered rightly, to learn the form from."""

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from nemotron.errors import UserError
from nemotron.files import write_text
from nemotron.posttrain.environments.base import Response, Row, messages_of
from nemotron.posttrain.environments.registry import ENVIRONMENTS, find_environment


@runtime_checkable
class Demonstrates(Protocol):
    """An environment that knows how its own tasks are answered."""

    def demonstrate(self, row: Row) -> Response:
        """Return a right answer, with the reasoning that leads to it."""
        ...


@dataclass(frozen=True)
class TaskSet:
    """Tasks of one environment and difficulty."""

    environment: str
    level: float = 0.0

    @classmethod
    def read(cls, text: str) -> "TaskSet":
        """Read `NAME` or `NAME@LEVEL`.

        Raises:
            UserError: when the level is not a number from 0.
        """
        name, _, level = text.partition("@")
        try:
            value = float(level or 0)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            rule = f"has no level from 0 behind the @; write {name}@1."
            raise UserError(rule, key=repr(text))
        return cls(name, value)


def write_chats(
    sets: Sequence[TaskSet], out: Path, *, count: int, seed: int, thinking: bool
) -> int:
    """Write `count` conversations of each set, mixed, as rows with `messages`; return how many.

    Raises:
        UserError: when an environment is unknown, cannot run here or has no answers of its own.
    """
    rows = itertools.chain.from_iterable(
        _chats(each, count, seed, thinking=thinking) for each in sets
    )
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    random.Random(seed).shuffle(lines)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "".join(lines))
    return len(lines)


def check_file(out: Path, *, overwrite: bool) -> None:
    """Raise UserError unless a file may be written."""
    if out.exists() and not out.is_file():
        raise UserError("is not a file; give the name of one.", where=str(out))
    if out.exists() and not overwrite:
        raise UserError("exists already; add --overwrite to replace it.", where=str(out))


def _chats(tasks: TaskSet, count: int, seed: int, *, thinking: bool) -> Iterator[dict[str, Any]]:
    environment = find_environment(tasks.environment)
    if not isinstance(environment, Demonstrates):
        able = [name for name, kind in ENVIRONMENTS.items() if issubclass(kind, Demonstrates)]
        raise UserError(
            f"{tasks.environment} does not answer its own tasks; choose from {', '.join(able)}."
        )
    for row in environment.rows(count, seed, tasks.level):
        answer = environment.demonstrate(row)
        turn = {"role": "assistant", "content": answer.text}
        if thinking and answer.reasoning:
            turn["reasoning_content"] = answer.reasoning
        yield {"messages": [*messages_of(row), turn]}
