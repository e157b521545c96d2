"""Runs a query that a model wrote: reading only, in bounded time and memory."""

import sqlite3
from typing import Any

Database = dict[str, dict[str, Any]]
"""`columns` (type by name) and `rows` (lists of values) of each table."""

MAX_LENGTH = 5_000
"""Characters of the longest query."""
MAX_ROWS = 5_000
MAX_INSTRUCTIONS = 5_000_000
"""Instructions of SQLite's machine after which a query is stopped."""
STEP = 10_000
TYPES = ("INTEGER", "REAL", "TEXT")
READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}
FUNCTIONS = frozenset(
    """abs avg coalesce concat count date datetime dense_rank first_value floor ceil group_concat
    ifnull iif instr julianday lag last_value lead length like lower ltrim max min nullif printf
    rank replace round row_number rtrim strftime substr substring sum time total trim typeof unicode
    upper ntile percent_rank cume_dist nth_value glob sign""".split()  # noqa: SIM905
)
"""What a query may call: nothing that is random, reads files or makes large values."""


class BadQuery(ValueError):
    """A query does not run, is not allowed or takes too much; says why."""


def run_query(database: Database, query: str) -> list[tuple[Any, ...]]:
    """Return the rows of a single query that only reads.

    Raises:
        BadQuery: when it is wrong, writes, takes too long or returns too much.
    """
    if not query.strip() or len(query) > MAX_LENGTH:
        raise BadQuery("the query is empty or too long")
    connection = _open(database)
    try:
        connection.set_authorizer(_authorize)
        connection.set_progress_handler(_Budget().spend, STEP)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 100_000)
        cursor = connection.execute(query)
        if cursor.description is None:
            raise BadQuery("this is not a query")
        rows = cursor.fetchmany(MAX_ROWS + 1)
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
        raise BadQuery(str(error)) from None
    finally:
        connection.close()
    if len(rows) > MAX_ROWS:
        raise BadQuery(f"more than {MAX_ROWS} rows")
    return rows


class _Budget:
    """Counts the instructions of one query."""

    def __init__(self) -> None:
        self._left = MAX_INSTRUCTIONS // STEP

    def spend(self) -> int:
        """Return 1, which stops the query, when nothing is left."""
        self._left -= 1
        return int(self._left < 0)


def _authorize(
    action: int, first: str | None, second: str | None, database: str | None, source: str | None
) -> int:
    if action == sqlite3.SQLITE_FUNCTION:
        allowed = (second or "").lower() in FUNCTIONS
    elif action == sqlite3.SQLITE_READ:
        allowed = not (first or "").lower().startswith("sqlite_")
    else:
        allowed = action in READING
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def _open(database: Database) -> sqlite3.Connection:
    """Return a database in memory.

    Raises:
        BadQuery: when it cannot be made.
    """
    connection = sqlite3.connect(":memory:", isolation_level=None)
    try:
        for statement in create_statements(database):
            connection.execute(statement)
        for table, content in database.items():
            marks = ", ".join("?" for _ in content["columns"])
            connection.executemany(f"INSERT INTO {quoted(table)} VALUES ({marks})", content["rows"])
    except (sqlite3.Error, OverflowError) as error:
        connection.close()
        raise BadQuery(f"the database cannot be made: {error}") from None
    return connection


def create_statements(database: Database) -> list[str]:
    """Return the statement that creates each table."""
    return [
        f"CREATE TABLE {quoted(table)} ("
        + ", ".join(f"{quoted(name)} {kind}" for name, kind in content["columns"].items())
        + ")"
        for table, content in database.items()
    ]


def quoted(name: str) -> str:
    """Return a name as SQL writes it, in quotation marks where it is not a plain word."""
    return name if name.isidentifier() and name.isascii() else '"' + name.replace('"', '""') + '"'
