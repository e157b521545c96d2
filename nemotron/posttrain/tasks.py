"""The prompts of a run: which task comes when, and how its prompt is written."""

import random
from collections import Counter
from dataclasses import dataclass

from nemotron.data.chat.template import TURN_END
from nemotron.data.tokenizer import Tokenizer, load_tokenizer
from nemotron.errors import UserError
from nemotron.posttrain.config import RlConfig
from nemotron.posttrain.contents import Contents
from nemotron.posttrain.environments.base import (
    BadRow,
    ReadsFile,
    Row,
    messages_of,
    params_of,
)
from nemotron.posttrain.environments.registry import find_environment
from nemotron.posttrain.holding_out import draw_rows
from nemotron.posttrain.prompts import Prompts
from nemotron.posttrain.suites.examine import Item


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
        self.prompts = Prompts(
            self.tokenizer,
            frozenset(self.tokenizer.id(token) for token in ends),
            self.is_chat,
            self._rollout.enable_thinking,
            self._rollout.stop,
        )

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
        rng = random.Random(f"{self._config.seed} rollout {number}")
        return self._draw(count, rng, held=False)

    def held_out(self) -> list[Task]:
        """Return the tasks of every evaluation."""
        count = self._rollout.evaluation_tasks
        return self._draw(count, random.Random(f"{self._config.seed} evaluation"), held=True)

    def _draw(self, count: int, rng: random.Random, *, held: bool) -> list[Task]:
        entries = self._rollout.environments
        names = rng.choices(range(len(entries)), [entry.weight for entry in entries], k=count)
        rows = {}
        for index, needed in Counter(names).items():
            entry, seed = entries[index], rng.getrandbits(48)
            environment = self.environments[entry.name]
            fraction = self._rollout.held_out_fraction
            rows[index] = draw_rows(environment, needed, seed, entry.level, fraction, held=held)
        return [self._task(entries[index].name, next(rows[index])) for index in names]

    def _task(self, name: str, row: Row) -> Task:
        try:
            offers_tools = bool(params_of(row).get("tools"))
            prompt = self.prompts.write(messages_of(row))
        except BadRow as problem:
            raise UserError(f"a row of {name}: {problem}", key="rollout.environments") from None
        if offers_tools:
            raise UserError(
                "offers tools, whose turns are not rolled out yet; use one without tools.",
                key="rollout.environments",
                value=name,
            )
        if len(prompt) + self._rollout.max_new_tokens > self._config.data.seq_len + 1:
            raise UserError(
                f"does not hold a prompt of {name} with {len(prompt)} tokens and an answer of "
                f"rollout.max_new_tokens = {self._rollout.max_new_tokens}; raise it.",
                key="data.seq_len",
                value=self._config.data.seq_len,
            )
        return Task(name, row, prompt)


def held_out_items(tasks: Tasks) -> list[Item]:
    """Return the held-out tasks of a recipe as rows to answer, each under its environment."""
    return [
        Item(task.environment, number, task.row, task.prompt)
        for number, task in enumerate(tasks.held_out())
    ]
