"""`text_to_sql`: answer a question about a database with a query; its results are compared."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from nemotron.posttrain.environments.base import (
    BadRow,
    Response,
    Row,
    Verdict,
    WithoutTools,
    build_row,
    find_field,
    optional_field,
    random_of,
    whole_level,
)
from nemotron.posttrain.environments.sql import (
    TYPES,
    BadQuery,
    Database,
    create_statements,
    run_query,
)
from nemotron.posttrain.environments.sql_tasks import THEMES, make_database, make_task

FENCE = re.compile(r"```(?:sql|sqlite)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
SHOWN = 3
"""Rows of each table that the prompt shows."""


class TextToSql(WithoutTools):
    """Write one query whose results equal those of the query of the row.

    Both run on every database of `databases`, which only differ in their rows. The prompt shows
    some rows of the first alone, so that a query with written-out results fails on the others.
    Rows are compared as a multiset, and in order where `is_ordered` is true; names of columns do
    not count. The last block of code counts, or the whole answer.
    """

    name = "text_to_sql"
    max_level = 8
    """Kinds of question end at 4, sizes of tables here."""

    def rows(self, count: int, seed: int, level: float) -> Iterator[Row]:
        """Yield tasks; each depends on `seed`, `level` and its number alone."""
        for number in range(count):
            rng = random_of(self.name, seed, level, number)
            whole, theme = whole_level(rng, level), rng.choice(THEMES)
            size = min(5 + 2 * whole, 20)
            databases = [make_database(rng, theme, size) for _ in range(3)]
            task = make_task(rng, theme, databases[0], whole)
            yield build_row(
                self.name,
                _prompt(databases[0], task.question),
                databases=databases,
                expected_query=task.query,
                is_ordered=task.is_ordered,
            )

    def check(self, row: Row) -> None:
        """Check the databases, and that the expected query runs on each.

        Raises:
            BadRow: when one is malformed, or the query fails.
        """
        databases = find_field(row, "databases")
        if not isinstance(databases, list) or not databases:
            raise BadRow("databases is not a list of databases; give at least one")
        query = find_field(row, "expected_query")
        if not isinstance(query, str):
            raise BadRow(f"expected_query = {query!r:.80} is not a text; give a query")
        for number, database in enumerate(databases):
            _check_database(database, f"databases.{number}")
            try:
                run_query(database, query)
            except BadQuery as error:
                raise BadRow(f"expected_query fails on databases.{number}: {error}") from None

    def verify(self, row: Row, response: Response, state: Any) -> Verdict:
        """Reward 1 if the results are equal on every database, else 0."""
        query = extract(response.text)
        is_ordered = bool(optional_field(row, "is_ordered", False))
        for database in find_field(row, "databases"):
            wanted = run_query(database, find_field(row, "expected_query"))
            try:
                found = run_query(database, query)
            except BadQuery:
                return Verdict(0.0, extracted=query)
            if not _are_equal(found, wanted, is_ordered):
                return Verdict(0.0, extracted=query)
        return Verdict(1.0, extracted=query)


def extract(text: str) -> str:
    """Return the last block of code, else the whole text."""
    blocks = FENCE.findall(text)
    return (blocks[-1] if blocks else text).strip()


def _are_equal(
    found: list[tuple[Any, ...]], wanted: list[tuple[Any, ...]], is_ordered: bool
) -> bool:
    first, second = list(map(_plain, found)), list(map(_plain, wanted))
    return first == second if is_ordered else Counter(first) == Counter(second)


def _plain(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return values whose equality is that of the meaning: 2 and 2.0, sums in another order."""
    return tuple(float(f"{value:.9g}") if isinstance(value, float) else value for value in row)


def _check_database(database: Database, place: str) -> None:
    for table, content in database.items() if isinstance(database, dict) else [("", None)]:
        if not isinstance(content, dict) or not {"columns", "rows"} <= content.keys():
            raise BadRow(f"{place}.{table} lacks columns or rows; give both")
        rows = content["rows"]
        if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
            raise BadRow(f"{place}.{table}.rows is not a list of rows; give lists of values")
        kinds = content["columns"].values() if isinstance(content["columns"], dict) else [""]
        if not all(kind in TYPES for kind in kinds):
            raise BadRow(f"{place}.{table}.columns has an unknown type; use {', '.join(TYPES)}")


def _prompt(database: Database, question: str) -> str:
    parts = []
    tables = zip(create_statements(database), database.values(), strict=True)
    for statement, content in tables:
        shown = [str(tuple(row)) for row in content["rows"][:SHOWN]]
        parts += [f"{statement};", f"-- {len(content['rows'])} rows, such as:"]
        parts += [f"-- {row}" for row in shown]
    return "\n".join([*parts, question, "Answer with one SQLite query in a block of code."])
