"""The prompts of a run: which task comes when, and how its prompt is written."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from nemotron.data.chat.render import render
from nemotron.data.chat.template import TURN_END
from nemotron.data.tokenizer import Tokenizer, load_tokenizer
from nemotron.errors import UserError
from nemotron.posttrain.config import RlConfig
from nemotron.posttrain.contents import Contents
from nemotron.posttrain.environments.base import (
    BadRow,
    ReadsFile,
    Response,
    Row,
    messages_of,
    params_of,
)
from nemotron.posttrain.environments.registry import find_environment

EVALUATION = -1
"""Number of the batch that is only evaluated on; its tasks are drawn with another seed."""


@dataclass(frozen=True)
class Task:
    """A row of an environment, and the tokens of its prompt."""

    environment: str
    row: Row
    prompt: tuple[int, ...]


class Tasks:
    """The tasks of every rollout batch, a function of the seed and the batch's number."""

    def __init__(self, config: RlConfig) -> None:
        """Make the environments.

        Raises:
            UserError: when an environment is unknown or cannot run here.
        """
        self._config, self._rollout = config, config.rollout
        self.tokenizer: Tokenizer = load_tokenizer(config.data.tokenizer)
        own = {e.name: find_environment(e.name, e.options) for e in self._rollout.environments}
        self.environments = own
        self.is_chat = self._rollout.prompt == "chat"
        ends = [config.data.eod_token, *([TURN_END] if self.is_chat else [])]
        self.stop_ids = frozenset(self.tokenizer.id(token) for token in ends)

    @property
    def options(self) -> dict[str, dict[str, object]]:
        """What each environment is made with."""
        return {entry.name: entry.options for entry in self._rollout.environments}

    def contents(self) -> Contents:
        """Return the hashes of the files that environments read their rows from.

        Raises:
            UserError: when one of them cannot be read.
        """
        found: Contents = {}
        for environment in self.environments.values():
            if isinstance(environment, ReadsFile):
                found |= environment.contents()
        return found

    @property
    def has_conversations(self) -> bool:
        """Whether the model answers in the chat format."""
        return self.is_chat

    def describe(self) -> list[str]:
        """Return a line for each environment, for the log."""
        whole = sum(entry.weight for entry in self._rollout.environments)
        return [
            f"{entry.name}: {entry.weight / whole:.1%} of the prompts, level {entry.level:g}"
            for entry in self._rollout.environments
        ]

    def batch(self, number: int) -> list[Task]:
        """Return the tasks of a rollout batch, in their order.

        Raises:
            UserError: when a prompt does not leave room for an answer.
        """
        count = self._rollout.num_prompts_per_step
        return self._draw(count, random.Random(f"{self._config.seed} rollout {number}"))

    def held_out(self) -> list[Task]:
        """Return the tasks of every evaluation."""
        count = self._rollout.evaluation_tasks
        return self._draw(count, random.Random(f"{self._config.seed} evaluation"))

    def response(self, answer: Sequence[int], *, is_truncated: bool) -> Response:
        """Return an answer's tokens as text; in the chat format without its reasoning."""
        while answer and answer[-1] in self.stop_ids:
            answer = answer[:-1]
        text = self.tokenizer.decode(answer)
        for stop in self._rollout.stop:
            text = text.removesuffix(stop)
        if not self.is_chat:
            return Response(text, is_truncated=is_truncated)
        reasoning, closed, after = text.rpartition("</think>")
        if not closed and self._rollout.enable_thinking:
            # the prompt ends inside the reasoning, which was never closed: there is no answer
            return Response("", reasoning=text.strip(), is_truncated=is_truncated)
        text = (after if closed else text).strip()
        return Response(
            text,
            reasoning=reasoning.removeprefix("<think>").strip(),
            output=({"type": "message", "content": [{"type": "output_text", "text": text}]},),
            is_truncated=is_truncated,
        )

    def _draw(self, count: int, rng: random.Random) -> list[Task]:
        entries = self._rollout.environments
        names = rng.choices(range(len(entries)), [entry.weight for entry in entries], k=count)
        rows = {}
        for index, needed in Counter(names).items():
            entry, seed = entries[index], rng.getrandbits(48)
            rows[index] = self.environments[entry.name].rows(needed, seed, entry.level)
        return [self._task(entries[index].name, next(rows[index])) for index in names]

    def _task(self, name: str, row: Row) -> Task:
        try:
            offers_tools = bool(params_of(row).get("tools"))
            text = self._text(messages_of(row))
        except (BadRow, TemplateError) as problem:
            raise UserError(f"a row of {name}: {problem}", key="rollout.environments") from None
        if offers_tools:
            raise UserError(
                "offers tools, whose turns are not rolled out yet; use one without tools.",
                key="rollout.environments",
                value=name,
            )
        prompt = tuple(self.tokenizer.encode(text, specials=self.is_chat))
        if len(prompt) + self._rollout.max_new_tokens > self._config.data.seq_len + 1:
            raise UserError(
                f"does not hold a prompt of {name} with {len(prompt)} tokens and an answer of "
                f"rollout.max_new_tokens = {self._rollout.max_new_tokens}; raise it.",
                key="data.seq_len",
                value=self._config.data.seq_len,
            )
        return Task(name, row, prompt)

    def _text(self, messages: list[dict[str, Any]]) -> str:
        if not self.is_chat:
            return str(messages[-1]["content"])
        thinking = self._rollout.enable_thinking
        return render(messages, enable_thinking=thinking, add_generation_prompt=True).text
