"""The prompts of a run: which task comes when, and how its prompt is written."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from nemotron.data.chat.template import TURN_END
from nemotron.data.tokenizer import Tokenizer, load_tokenizer
from nemotron.errors import UserError
from nemotron.posttrain.config import RlConfig
from nemotron.posttrain.contents import Contents
from nemotron.posttrain.curriculum import Curriculum
from nemotron.posttrain.environments.base import (
    BadRow,
    ReadsFile,
    Row,
    belonging_to,
    level_problem,
    messages_of,
    params_of,
)
from nemotron.posttrain.environments.registry import find_environment
from nemotron.posttrain.holding_out import draw_rows
from nemotron.posttrain.prompts import Prompts
from nemotron.posttrain.suites.examine import Drawing, Item
from nemotron.posttrain.verify import Verifiers

SPARE = 4
"""Tasks that a curriculum chooses from, for each that is asked."""


@dataclass(frozen=True)
class Task:
    """A row of an environment, and the tokens of its prompt."""

    environment: str
    row: Row
    prompt: tuple[int, ...]
    level: float = 0.0
    """Difficulty that it was made with."""


class Tasks:
    """The tasks of every rollout batch, a function of the seed and the batch's number."""

    def __init__(self, config: RlConfig) -> None:
        """Make the environments.

        Raises:
            UserError: when an environment is unknown or cannot run here.
        """
        self._config, self._rollout = config, config.rollout
        self.tokenizer: Tokenizer = load_tokenizer(config.data.tokenizer)
        own = {e.title: find_environment(e.name, e.options) for e in self._rollout.environments}
        for entry in self._rollout.environments:
            if problem := level_problem(own[entry.title], entry.level):
                where = f"environments: {entry.title}"
                raise UserError(problem, key="level", value=entry.level, where=where)
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

    def verifiers(self) -> Verifiers:
        """Return processes that judge answers to these tasks."""
        entries = self._rollout.environments
        return Verifiers(
            self._rollout.verify_workers,
            {entry.title: entry.options for entry in entries},
            {entry.title: entry.name for entry in entries},
        )

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
            f"{entry.title}: {entry.weight / whole:.1%} of the prompts, level {entry.level:g}"
            for entry in self._rollout.environments
        ]

    def batch(self, number: int, curriculum: Curriculum | None = None) -> list[Task]:
        """Return the tasks of a rollout batch, in their order; a curriculum chooses among them.

        Raises:
            UserError: when a prompt does not leave room for an answer.
        """
        count = self._rollout.num_prompts_per_step
        rng = random.Random(f"{self._config.seed} rollout {number}")
        if curriculum is None:
            return self._draw(count, rng, held=False)
        return self._choose(count, rng, curriculum)

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
            rows[index] = self._rows(entry.title, needed, seed, entry.level, held=held)
        return [
            self._task(entries[index].title, next(rows[index]), entries[index].level)
            for index in names
        ]

    def _choose(self, count: int, rng: random.Random, curriculum: Curriculum) -> list[Task]:
        """Draw levels and tasks by their pass rates."""
        entries = self._rollout.environments
        names = rng.choices([e.title for e in entries], [e.weight for e in entries], k=count)
        kinds = [(name, curriculum.level(name, rng)) for name in names]
        rows = {}
        for (name, level), needed in Counter(kinds).items():
            seed = rng.getrandbits(48)
            made = list(self._rows(name, SPARE * needed, seed, level, held=False))
            asked = [row for row in made if curriculum.accepts(row, rng)]
            # if too few were accepted, the first ones of all come once more
            rows[name, level] = iter([*asked, *made])
        return [self._task(name, next(rows[name, level]), level) for name, level in kinds]

    def _rows(self, name: str, count: int, seed: int, level: float, *, held: bool) -> Iterator[Row]:
        fraction = self._rollout.held_out_fraction
        drawn = draw_rows(self.environments[name], count, seed, level, fraction, held=held)
        return (belonging_to(row, name) for row in drawn)

    def _task(self, name: str, row: Row, level: float) -> Task:
        try:
            tools = params_of(row).get("tools") or ()
            prompt = self.prompts.write(messages_of(row), tools)
        except BadRow as problem:
            raise UserError(f"a row of {name}: {problem}", key="rollout.environments") from None
        if tools and not self.is_chat:
            raise UserError(
                "offers tools, which need the chat format; use rollout.prompt: chat.",
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
        return Task(name, row, prompt, level)


def held_out_drawing(config: RlConfig, budget: int | None = None) -> Drawing:
    """Return how the held-out tasks of a recipe are answered: once, by the likeliest tokens."""
    rollout = config.rollout
    return Drawing(
        verify_timeout_s=rollout.verify_timeout_s,
        budget=budget,
        max_turns=rollout.max_turns,
        max_tokens=config.data.seq_len + 1,
    )


def held_out_items(tasks: Tasks) -> list[Item]:
    """Return the held-out tasks of a recipe as rows to answer, each under its environment."""
    return [
        Item(task.environment, number, task.row, task.prompt)
        for number, task in enumerate(tasks.held_out())
    ]
