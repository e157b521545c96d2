"""The tasks of suites made ready for a model: environments, rows, prompts, and groups to answer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nemotron.errors import UserError
from nemotron.posttrain.answering import Answerer, seed_of
from nemotron.posttrain.environments.base import (
    BadRow,
    Environment,
    Row,
    level_problem,
    messages_of,
    params_of,
)
from nemotron.posttrain.environments.registry import find_environment
from nemotron.posttrain.prompts import Prompts
from nemotron.posttrain.suites.definition import SuiteTask
from nemotron.posttrain.suites.examine import Drawing, Item, examine
from nemotron.posttrain.suites.samples import Sample
from nemotron.posttrain.verify import Verifiers


@dataclass(frozen=True)
class SuiteSettings:
    """How much is asked, and how answers are drawn and judged."""

    tasks: int = 64
    """Rows of each task."""
    samples: int = 1
    """Answers to each row."""
    temperature: float = 0.0
    seed: int = 0
    """Of rows and answers; rows for training have other seeds."""
    verify_workers: int = 1
    verify_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if self.samples > 1 and not self.temperature:
            raise UserError(
                "are all the same at temperature 0; raise the temperature, or ask for one.",
                key="samples",
                value=self.samples,
            )


@dataclass(frozen=True)
class Group:
    """Rows of one task that are answered together, whatever else is asked."""

    task: SuiteTask
    first: int
    stop: int


class Suites:
    """Tasks whose environments exist here."""

    def __init__(
        self,
        tasks: Sequence[SuiteTask],
        prompts: Prompts,
        settings: SuiteSettings,
        *,
        leaves_out: bool = False,
    ) -> None:
        """Make the environments and a first row of each task.

        With `leaves_out` tasks that cannot run here are left out, with the reason.

        Raises:
            UserError: when a task cannot run here, or nothing is left.
        """
        self.settings, self.prompts = settings, prompts
        self.tasks: list[SuiteTask] = []
        self.left_out: dict[str, str] = {}
        self.environments: dict[str, Environment] = {}
        self._rows: tuple[str, list[Row]] = ("", [])
        for task in tasks:
            try:
                environment = find_environment(task.environment, task.options)
                self._check(task, environment)
            except UserError as problem:
                if not leaves_out:
                    raise
                self.left_out[task.name] = str(problem)
            else:
                self.environments[task.name] = environment
                self.tasks.append(task)
        if tasks and not self.tasks:
            raise UserError(f"no task can run here: {next(iter(self.left_out.values()))}")

    def verifiers(self) -> Verifiers:
        """Return what judges the answers; the caller closes it."""
        options = {task.environment: task.options for task in self.tasks}
        return Verifiers(self.settings.verify_workers, options)

    def groups(self, slots: int) -> Iterator[Group]:
        """Yield the rows in groups of about `2 * slots` answers."""
        size = max(1, 2 * slots // self.settings.samples)
        for task in self.tasks:
            rows = task.rows or self.settings.tasks
            for first in range(0, rows, size):
                yield Group(task, first, min(first + size, rows))

    def items(self, group: Group) -> list[Item]:
        """Return the rows of a group with their prompts."""
        task = group.task
        if self._rows[0] != task.name:
            rows = self._make(task, self.environments[task.name], task.rows or self.settings.tasks)
            self._rows = (task.name, rows)
        rows = self._rows[1]
        by_likelihood = task.method == "likelihood"
        return [
            Item(task.name, number, rows[number], self._prompt(rows[number]), by_likelihood)
            for number in range(group.first, group.stop)
        ]

    def answer(
        self, answerer: Answerer, verifiers: Verifiers, items: Sequence[Item]
    ) -> list[Sample]:
        """Return the judged answers to some rows."""
        settings, budget = self.settings, answerer.how.budget
        how = Drawing(
            settings.samples,
            settings.temperature,
            settings.seed,
            settings.verify_timeout_s,
            None if budget is None else budget.tokens,
        )
        return examine(answerer, verifiers, items, how)

    def _make(self, task: SuiteTask, environment: Environment, count: int) -> list[Row]:
        seed = seed_of("suite", self.settings.seed)
        return list(environment.rows(count, seed, task.level))

    def _check(self, task: SuiteTask, environment: Environment) -> None:
        """Refuse a task that this way of writing prompts cannot ask.

        Raises:
            UserError: saying why.
        """
        if problem := level_problem(environment, task.level):
            raise UserError(problem, key="suite", value=task.name)
        [row] = self._make(task, environment, 1)
        try:
            if params_of(row).get("tools") and not self.prompts.is_chat:
                raise UserError(
                    "offers tools, which need the chat format; ask a chat model, or leave it out.",
                    key="suite",
                    value=task.name,
                )
            self._prompt(row)
        except BadRow as problem:
            raise UserError(str(problem), where=f"a row of {task.name}") from None

    def _prompt(self, row: Row) -> tuple[int, ...]:
        tools = params_of(row).get("tools") or ()
        return self.prompts.write(messages_of(row), tools)
