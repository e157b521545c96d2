"""`tool_calc_db`: do jobs in a small office with tools; the tables at the end are judged."""

import copy
import json
import re
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from nemotron.posttrain.environments import desk
from nemotron.posttrain.environments.answer import last_boxed
from nemotron.posttrain.environments.base import (
    BadRow,
    Response,
    Row,
    Verdict,
    build_row,
    calls_of,
    find_field,
    optional_field,
    random_of,
    whole_level,
)
from nemotron.posttrain.environments.calculator import BadExpression, evaluate
from nemotron.posttrain.environments.desk_tasks import make_jobs, make_tables

NUMBER = re.compile(r"-?[0-9]{1,15}(?:\.[0-9]{1,12})?")
MAX_CALLS = 100
"""Calls of one response that are replayed; a response with more earns nothing."""


class ToolCalcDb:
    """Change e-mails, events and orders as asked, and compute, with tools over several turns.

    The verifier replays the calls of the response and those of `ground_truth` on fresh copies of
    `tables`, and compares the results, as Workplace Assistant of NVIDIA-NeMo/Gym does. Rows that
    calls add are compared without their id, and texts without regard to case and outer blanks.
    Where the row has `expected_answer`, the last `\\boxed{}` must contain that number as well.
    Level 0 has one job, every second further level one more; tables grow with the level.
    """

    name = "tool_calc_db"
    max_level = 16
    """Has every kind of job once; tables end growing at 11."""

    def rows(self, count: int, seed: int, level: float) -> Iterator[Row]:
        """Yield tasks; each depends on `seed`, `level` and its number alone."""
        for number in range(count):
            rng = random_of(self.name, seed, level, number)
            whole = whole_level(rng, level)
            tables = make_tables(rng, min(3 + 2 * whole, 25))
            jobs = make_jobs(rng, tables, whole)
            answers = [job.answer for job in jobs if job.answer is not None]
            fields: dict[str, Any] = {"expected_answer": answers[0]} if answers else {}
            wish = ["Give the number in \\boxed{} at the end."] if answers else []
            row = build_row(
                self.name,
                " ".join([*(job.text for job in jobs), *wish]),
                tables=tables,
                ground_truth=[call for job in jobs for call in job.calls],
                **fields,
            )
            row["responses_create_params"]["tools"] = self.tools(row)
            yield row

    def check(self, row: Row) -> None:
        """Check tables, the calls of the ground truth and the expected answer.

        Raises:
            BadRow: when one is malformed, or a call of the ground truth fails.
        """
        tables = _check_tables(find_field(row, "tables"))
        truth, answer = find_field(row, "ground_truth"), optional_field(row, "expected_answer", "")
        if not truth and answer == "":
            raise BadRow("ground_truth is empty and expected_answer absent; give one of them")
        if answer != "" and _number(str(answer)) is None:
            raise BadRow(f"expected_answer = {answer!r} is not a number; give one")
        if not isinstance(truth, list):
            raise BadRow(f"ground_truth = {truth!r:.80} is not a list of calls; give one")
        for call in truth:
            if not isinstance(call, dict) or not {"name", "arguments"} <= call.keys():
                raise BadRow(f"ground_truth contains {call!r}; give name and arguments")
            said = desk.run_tool(tables, call["name"], _arguments(call["arguments"]))
            if said.startswith("error:"):
                raise BadRow(f"ground_truth calls {call['name']}, which answers: {said}; mend it")

    def tools(self, row: Row) -> list[dict[str, Any]]:
        """Return the tools, the same for every row."""
        return desk.specifications()

    def seed(self, row: Row) -> desk.Tables:
        """Return a copy of the tables."""
        return copy.deepcopy(find_field(row, "tables"))

    def call(self, state: desk.Tables, name: str, arguments: Any) -> str:
        """Run a tool on the tables."""
        return desk.run_tool(state, name, arguments)

    def verify(self, row: Row, response: Response, state: Any) -> Verdict:
        """Reward 1 if the tables are as they should be and the answer is right, else 0."""
        made = calls_of(response)
        if len(made) > MAX_CALLS:
            return Verdict(0.0, components={"state": 0.0})
        wanted = self._after(row, [(c["name"], c["arguments"]) for c in row_calls(row)])
        found = self._after(row, [(call.name, call.arguments) for call in made])
        before = self.seed(row)
        parts = {"state": float(_content(found, before) == _content(wanted, before))}
        extracted = last_boxed(response.text)
        answer = optional_field(row, "expected_answer", "")
        if answer != "":
            given = None if extracted is None else _number(extracted)
            parts["answer"] = float(given is not None and given == _number(str(answer)))
        return Verdict(float(all(parts.values())), components=parts, extracted=extracted)

    def _after(self, row: Row, calls: list[tuple[str, Any]]) -> desk.Tables:
        """Return the tables after calls."""
        tables = self.seed(row)
        for name, arguments in calls:
            self.call(tables, name, _arguments(arguments))
        return tables


def row_calls(row: Row) -> list[dict[str, Any]]:
    """Return the calls that fulfill a row."""
    return list(find_field(row, "ground_truth"))


def _arguments(given: Any) -> Any:
    """Return arguments as a value, None where their text is not JSON."""
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError):
        return None


def _content(tables: desk.Tables, before: desk.Tables) -> dict[str, Counter[str]]:
    """Return the rows of each table in a form that is compared."""
    found = {}
    for table, rows in tables.items():
        old = {row["id"] for row in before.get(table, [])}
        found[table] = Counter(
            json.dumps({k: _plain(v) for k, v in row.items() if k != "id" or v in old})
            for row in rows
        )
    return found


def _plain(value: Any) -> Any:
    """Return a text without case and outer blanks, and 12.50 as 12.5."""
    if not isinstance(value, str):
        return value
    text = value.strip().casefold()
    return str(Fraction(text)) if NUMBER.fullmatch(text) else text


def _number(text: str) -> Fraction | None:
    """Return a plain decimal number or fraction; an expression counts as none."""
    text = text.strip().strip("$ ").replace(",", "")
    if any(sign in text[1:] for sign in "+-*(%") or not text.isascii():
        return None
    try:
        return evaluate(text)
    except BadExpression:
        return None


def _check_tables(tables: Any) -> desk.Tables:
    """Return a copy of the tables with those that are absent.

    Raises:
        BadRow: when a row lacks a column, has another type, or an id occurs twice.
    """
    if not isinstance(tables, dict) or not tables.keys() <= desk.COLUMNS.keys():
        raise BadRow(f"tables is not an object of {', '.join(desk.COLUMNS)}; give their rows")
    for table, rows in tables.items():
        wanted = {"id": int, **desk.COLUMNS[table]}
        if not isinstance(rows, list):
            raise BadRow(f"tables.{table} is not a list of rows; give one")
        for row in rows:
            fits = isinstance(row, dict) and row.keys() == wanted.keys()
            if not fits or not all(_is(row[name], kind) for name, kind in wanted.items()):
                raise BadRow(f"tables.{table} contains {row!r}; give {', '.join(wanted)}")
        if len({row["id"] for row in rows}) != len(rows):
            raise BadRow(f"tables.{table} has an id twice; give each row its own")
    return copy.deepcopy(tables)


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, int) and abs(value) >= 2**31:
        return False
    return isinstance(value, (int, float) if kind is float else kind)
