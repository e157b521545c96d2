"""A finished model on suites: its answers into a file, its results onto the screen and as JSON."""

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemotron.errors import UserError
from nemotron.evaluate.model import Asking, Evaluated
from nemotron.evaluate.ruler import collect
from nemotron.evaluate.sample_file import SAMPLES, WEIGHTS, SampleFile
from nemotron.generate.budget import ReasoningBudget
from nemotron.posttrain.answering import Answerer, Answering
from nemotron.posttrain.suites.budgets import write_curve
from nemotron.posttrain.suites.definition import (
    OFFLINE,
    RULER,
    find_tasks,
    ruler_tasks,
)
from nemotron.posttrain.suites.results import Result, summarize
from nemotron.posttrain.suites.samples import Sample
from nemotron.posttrain.suites.suites import Suites, SuiteSettings
from nemotron.terminal import print_text

RULER_ROWS = 8
"""Rows of each cell of the grid, unless another number is given."""


@dataclass(frozen=True)
class Plan:
    """What is asked of a model, and how it answers."""

    suites: tuple[str, ...]
    settings: SuiteSettings = field(default_factory=SuiteSettings)
    asking: Asking = field(default_factory=Asking)
    max_new_tokens: int = 256
    slots: int = 32
    row_by_row: bool = False
    budgets: tuple[int, ...] = ()
    """Tokens after which reasoning is closed, each a pass over all tasks; none: never."""
    lengths: tuple[int, ...] = (512, 2048)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    ruler_rows: int = RULER_ROWS


@dataclass
class Outcome:
    """All answers of one model, and what they amount to."""

    samples: list[Sample] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    ruler: dict[str, Any] | None = None

    def add(self, samples: Sequence[Sample]) -> None:
        """Add the answers to one task, and print their result."""
        self.samples += samples
        self.results += summarize(samples)
        print_text(str(self.results[-1]))

    def as_json(self) -> dict[str, Any]:
        """Return the results as JSON, without the answers."""
        found: dict[str, Any] = {"results": [result.as_json() for result in self.results]}
        if self.left_out:
            found["left_out"] = self.left_out
        if self.ruler is not None:
            found["ruler"] = self.ruler
        return found


def run_suites(loaded: Evaluated, plan: Plan, folder: Path | None, name: str = SAMPLES) -> Outcome:
    """Answer the tasks of a plan, print a line for each, and return the results.

    With a folder every answer is written to it, and those that it holds are not given again.

    Raises:
        UserError: when a task is unknown or cannot run here, or the folder is another's.
    """
    if plan.budgets and not loaded.prompts.is_chat:
        rule = "closes reasoning, which only the chat format has; leave it out."
        raise UserError(rule, key="--budget", value=plan.budgets[0])
    suites = _suites(plan, loaded)
    for reason in dict.fromkeys(suites.left_out.values()):
        names = [name for name, own in suites.left_out.items() if own == reason]
        print_text(f"{', '.join(names)} left out: {reason}")
    outcome = Outcome(left_out=suites.left_out)
    settings = {**_settings(plan, suites), WEIGHTS: loaded.digest() if folder else ""}
    with _file(folder, name, settings) as file, suites.verifiers() as verifiers:
        start, tokens = time.perf_counter(), 0
        for budget in plan.budgets or (None,):
            answerer = Answerer(loaded.model, loaded.prompts, _answering(plan, loaded, budget))
            for _, groups in itertools.groupby(suites.groups(plan.slots), lambda g: g.task.name):
                own: list[Sample] = []
                for group in groups:
                    items = suites.items(group)
                    samples = file.take(items, budget, plan.settings.samples) if file else None
                    if samples is None:
                        samples = suites.answer(answerer, verifiers, items)
                        tokens += sum(sample.num_tokens for sample in samples)
                        if file is not None:
                            file.write(samples)
                    own += samples
                outcome.add(own)
        seconds = time.perf_counter() - start
    if tokens:
        print_text(f"{tokens} tokens in {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s")
    grid = collect(suites.tasks, outcome.results)
    if grid is not None:
        outcome.ruler = grid.as_json()
        if folder is not None and name == SAMPLES:
            grid.draw(folder / f"{RULER}.svg")
    if folder is not None and name == SAMPLES and len(plan.budgets) > 1:
        write_curve(outcome.results, folder / "budgets.svg")
    return outcome


def _suites(plan: Plan, loaded: Evaluated) -> Suites:
    tokenizer = str(loaded.tokenizer_file.absolute())
    tasks = find_tasks(plan.suites, tokenizer)
    if RULER in plan.suites:
        tasks += ruler_tasks(plan.lengths, plan.depths, tokenizer, plan.ruler_rows)
    leaves_out = OFFLINE in plan.suites
    return Suites(tasks, loaded.prompts, plan.settings, leaves_out=leaves_out)


def _settings(plan: Plan, suites: Suites) -> dict[str, Any]:
    """Return all that answers depend on, beside the model, by the options of the command."""
    return {
        "suite": [[task.name, task.rows] for task in suites.tasks],
        "tasks": plan.settings.tasks,
        "samples": plan.settings.samples,
        "temperature": plan.settings.temperature,
        "seed": plan.settings.seed,
        **dataclasses.asdict(plan.asking),
        "max_new_tokens": plan.max_new_tokens,
        "batch": plan.slots,
        "row_by_row": plan.row_by_row,
        "budget": list(plan.budgets),
    }


def _answering(plan: Plan, loaded: Evaluated, budget: int | None) -> Answering:
    tokenizer = loaded.prompts.tokenizer
    closing = None if budget is None else ReasoningBudget.of(tokenizer, budget)
    return Answering(plan.max_new_tokens, plan.slots, closing, plan.row_by_row)


@contextmanager
def _file(folder: Path | None, name: str, settings: dict[str, Any]) -> Iterator[SampleFile | None]:
    if folder is None:
        yield None
        return
    file = SampleFile(folder / name, settings)
    try:
        yield file
    finally:
        file.close()
