"""Suites by name, and the tasks that they consist of."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from nemotron.errors import UserError
from nemotron.posttrain.demonstrations import TaskSet
from nemotron.posttrain.environments.gym_sets import CHOSEN
from nemotron.posttrain.environments.long_context import LONGEST
from nemotron.posttrain.environments.long_tasks import KINDS, NEEDLES
from nemotron.posttrain.environments.registry import ENVIRONMENTS

LIKELIHOOD = "_likelihood"
"""Ending of the name of an environment whose options are scored, in place of an answer."""
PERPLEXITY = "perplexity"
"""The suite without tasks: the loss on held-out text."""
RULER = "ruler"


@dataclass(frozen=True)
class SuiteTask:
    """Rows of one environment and difficulty, whose answers are averaged."""

    name: str
    """In results and metrics."""
    environment: str
    level: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    """What the environment is made with."""
    method: Literal["generate", "likelihood"] = "generate"
    rows: int | None = None
    """Of the task, where that is another number than for all."""

    @property
    def key(self) -> str:
        """The name in metrics, where trackers take no @."""
        return self.name.replace("@", "-")


def _levels(environment: str, *levels: float) -> tuple[str, ...]:
    return tuple(f"{environment}@{level:g}" for level in levels)


SUITES: dict[str, tuple[str, ...]] = {
    "arithmetic": _levels("arith_chain", 0, 1, 2),
    "instructions": (*_levels("if_constraints", 0, 2), *_levels("json_schema", 0)),
    "knowledge": (*_levels("mcqa", 1), *_levels(f"mcqa{LIKELIHOOD}", 1)),
    "mathematics": _levels("math_symbolic", 0),
    "tools": _levels("tool_calc_db", 0),
    "code": (*_levels("code_exec", 0), *_levels("text_to_sql", 0)),
    "gym": tuple(f"reasoning_gym.{name}@0" for name in CHOSEN),
    "long_context": _levels("long_context", 0, 1, 2, 3),
}
"""Tasks by the name of their suite."""
OFFLINE = "offline"
"""All of `SUITES`, of which those are left out that cannot run here."""
NAMES = (*SUITES, OFFLINE, RULER, PERPLEXITY)


def find_tasks(names: Sequence[str], tokenizer: str = "embedded") -> list[SuiteTask]:
    """Return the tasks of suites and environments (`NAME` or `NAME@LEVEL`), each once.

    Those of `ruler` and `perplexity` are not among them. `tokenizer` counts the length of texts:
    `embedded`, or the path of a `tokenizer.json`.

    Raises:
        UserError: when a name is unknown.
    """
    found = {task.name: task for name in names for task in _tasks(name, tokenizer)}
    return list(found.values())


def _tasks(name: str, tokenizer: str) -> Iterator[SuiteTask]:
    if name in (RULER, PERPLEXITY):
        return
    parts = sum(SUITES.values(), ()) if name == OFFLINE else SUITES.get(name, (name,))
    for part in parts:
        yield read_task(part, tokenizer)


def ruler_tasks(
    lengths: Sequence[int], depths: Sequence[float], tokenizer: str, rows: int
) -> list[SuiteTask]:
    """Return tasks for each kind of long text, length in tokens, and depth of what is sought.

    A depth is a share of the text; only needles have one.

    Raises:
        UserError: when a length or depth is impossible.
    """
    for key, values, limits in (("lengths", lengths, (64, LONGEST)), ("depths", depths, (0, 1))):
        for value in values:
            if not limits[0] <= value <= limits[1]:
                raise UserError(f"must lie in {limits[0]} … {limits[1]}.", key=key, value=value)
    return [
        SuiteTask(
            f"{RULER}.{kind}.{length}" + ("" if depth is None else f".{depth:g}"),
            "long_context",
            options={"kinds": [kind], "tokens": length, "depth": depth, "tokenizer": tokenizer},
            rows=rows,
        )
        for length in dict.fromkeys(lengths)
        for kind in KINDS
        for depth in (dict.fromkeys(depths) if kind in NEEDLES else (None,))
    ]


def read_task(text: str, tokenizer: str = "embedded") -> SuiteTask:
    """Read `NAME`, `NAME@LEVEL`, `reasoning_gym.SET@LEVEL` or `mcqa_likelihood@LEVEL`.

    Raises:
        UserError: when there is no such suite or environment.
    """
    given = TaskSet.read(text)
    environment, _, part = given.environment.partition(".")
    method: Literal["generate", "likelihood"] = "generate"
    if environment == f"mcqa{LIKELIHOOD}":
        environment, method = "mcqa", "likelihood"
    if given.environment in NAMES and given.environment not in ENVIRONMENTS:
        rule = f"is a suite with a level, which only an environment has; write {environment}."
        raise UserError(rule, key="suite", value=text)
    if given.tools:
        rule = "asks for tools, which `nemotron rl chats` alone does; leave out +tools."
        raise UserError(rule, key="suite", value=text)
    if environment not in ENVIRONMENTS or (part and environment != "reasoning_gym"):
        known = [*NAMES, *ENVIRONMENTS]
        near = difflib.get_close_matches(given.environment, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}."
        raise UserError(f"is unknown; {hint}", key="suite", value=text)
    name = f"{given.environment}@{given.level:g}"
    options: dict[str, Any] = {"datasets": [part]} if part else {}
    if environment == "long_context":
        options = {"tokenizer": tokenizer}
    return SuiteTask(name, environment, given.level, options, method)
