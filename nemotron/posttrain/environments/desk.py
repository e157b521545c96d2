"""A small office: tables of e-mails, events and orders in SQLite, and the tools that change them.

The content is a JSON value outside of a call, so that it is stored, sent and compared as it is.
"""

import json
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nemotron.posttrain.environments.calculator import BadExpression, evaluate, render

Tables = dict[str, list[dict[str, Any]]]

COLUMNS: dict[str, dict[str, type]] = {
    "email": {"sender": str, "recipient": str, "subject": str, "body": str, "folder": str},
    "calendar": {"title": str, "start": str, "minutes": int},
    "orders": {"customer": str, "item": str, "quantity": int, "price": float, "status": str},
}
"""Columns of each table beside its `id`."""
MAX_ROWS = 200
MAX_TEXT = 2_000
OWN_ADDRESS = "me@office.example"
STATUSES = ("open", "paid", "shipped", "cancelled")
FOLDERS = ("inbox", "archive", "sent", "spam")


class ToolError(ValueError):
    """A call of a tool is wrong; the model reads why."""


@dataclass(frozen=True)
class Tool:
    """A tool: what the model reads about it, and what it does."""

    description: str
    parameters: dict[str, type]
    run: Callable[[sqlite3.Connection, dict[str, Any]], str]


def run_tool(tables: Tables, name: str, arguments: Any) -> str:
    """Run a tool, change the tables in place, and return what the model reads.

    A call that is wrong changes nothing and returns a text that begins with "error:".
    """
    try:
        if not isinstance(name, str) or name not in TOOLS:
            raise ToolError(f"there is no tool {name}; there are {', '.join(TOOLS)}")
        given = _check(TOOLS[name], arguments)
        connection = open_tables(tables)
        try:
            said = TOOLS[name].run(connection, given)
            changed = read_tables(connection)
        finally:
            connection.close()
    except (ToolError, BadExpression) as error:
        return f"error: {error}"
    tables.update(changed)
    return said


def specifications() -> list[dict[str, Any]]:
    """Return all tools in the form of OpenAI's Responses format."""
    names = {str: "string", int: "integer", float: "number"}
    return [
        {
            "type": "function",
            "name": name,
            "description": tool.description,
            "parameters": {
                "type": "object",
                "properties": {key: {"type": names[kind]} for key, kind in tool.parameters.items()},
                "required": list(tool.parameters),
                "additionalProperties": False,
            },
        }
        for name, tool in TOOLS.items()
    ]


def open_tables(tables: Tables) -> sqlite3.Connection:
    """Return a database in memory with these rows."""
    connection = sqlite3.connect(":memory:")
    connection.row_factory = sqlite3.Row
    for table, columns in COLUMNS.items():
        names = ["id", *columns]
        connection.execute(f"CREATE TABLE {table} (id INTEGER PRIMARY KEY, {', '.join(columns)})")
        marks = ", ".join("?" for _ in names)
        rows = [[row[name] for name in names] for row in tables.get(table, [])]
        connection.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)
    return connection


def read_tables(connection: sqlite3.Connection) -> Tables:
    """Return all rows by table, in the order of their ids."""
    return {
        table: [dict(row) for row in connection.execute(f"SELECT * FROM {table} ORDER BY id")]
        for table in COLUMNS
    }


def _check(tool: Tool, arguments: Any) -> dict[str, Any]:
    """Return the arguments after checking names, types and sizes."""
    if not isinstance(arguments, dict):
        raise ToolError("the arguments must be a JSON object")
    if unknown := arguments.keys() - tool.parameters.keys():
        raise ToolError(f"there is no argument {min(unknown)}")
    for name, kind in tool.parameters.items():
        value = arguments.get(name)
        fits = isinstance(value, kind) and not isinstance(value, bool)
        if not fits or (isinstance(value, str) and len(value) > MAX_TEXT):
            raise ToolError(f"{name} must be a {'text' if kind is str else 'whole number'}")
        if isinstance(value, int) and abs(value) >= 2**31:
            raise ToolError(f"{name} is too large")
        if isinstance(value, str) and any("\ud800" <= each <= "\udfff" for each in value):
            raise ToolError(f"{name} contains half of a character")  # SQLite stores UTF-8
    return arguments


def _found(connection: sqlite3.Connection, query: str, values: tuple[Any, ...]) -> str:
    return json.dumps([dict(row) for row in connection.execute(query, values)])


def _change(connection: sqlite3.Connection, query: str, values: tuple[Any, ...]) -> str:
    if connection.execute(query, values).rowcount != 1:
        raise ToolError("there is no entry with this id")
    return "done"


def _insert(connection: sqlite3.Connection, table: str, values: tuple[Any, ...]) -> str:
    [count] = connection.execute(f"SELECT COUNT(*) FROM {table}").fetchone()
    if count >= MAX_ROWS:
        raise ToolError(f"the table {table} is full")
    marks = ", ".join("?" for _ in values)
    cursor = connection.execute(f"INSERT INTO {table} VALUES (NULL, {marks})", values)
    return f"done, id {cursor.lastrowid}"


def _one_of(value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ToolError(f"{value!r} is unknown; there are {', '.join(known)}")
    return value


def _positive(value: int) -> int:
    if value < 1:
        raise ToolError("the number must be at least 1")
    return value


TOOLS: dict[str, Tool] = {
    "calculate": Tool(
        "Compute an arithmetic expression.",
        {"expression": str},
        lambda connection, given: render(evaluate(given["expression"])),
    ),
    "find_emails": Tool(
        "List e-mails whose sender or subject contains a text.",
        {"text": str},
        lambda connection, given: _found(
            connection,
            "SELECT * FROM email WHERE instr(lower(sender || char(10) || subject), lower(?))",
            (given["text"],),
        ),
    ),
    "send_email": Tool(
        "Send an e-mail.",
        {"recipient": str, "subject": str, "body": str},
        lambda connection, given: _insert(
            connection,
            "email",
            (OWN_ADDRESS, given["recipient"], given["subject"], given["body"], "sent"),
        ),
    ),
    "move_email": Tool(
        f"Move an e-mail to another folder: {', '.join(FOLDERS)}.",
        {"id": int, "folder": str},
        lambda connection, given: _change(
            connection,
            "UPDATE email SET folder = ? WHERE id = ?",
            (_one_of(given["folder"], FOLDERS), given["id"]),
        ),
    ),
    "find_events": Tool(
        "List calendar events whose title or start contains a text.",
        {"text": str},
        lambda connection, given: _found(
            connection,
            "SELECT * FROM calendar WHERE instr(lower(title || char(10) || start), lower(?))",
            (given["text"],),
        ),
    ),
    "create_event": Tool(
        "Create a calendar event; start is written as 2026-03-31 14:30.",
        {"title": str, "start": str, "minutes": int},
        lambda connection, given: _insert(
            connection, "calendar", (given["title"], given["start"], _positive(given["minutes"]))
        ),
    ),
    "move_event": Tool(
        "Give a calendar event another start.",
        {"id": int, "start": str},
        lambda connection, given: _change(
            connection, "UPDATE calendar SET start = ? WHERE id = ?", (given["start"], given["id"])
        ),
    ),
    "cancel_event": Tool(
        "Remove a calendar event.",
        {"id": int},
        lambda connection, given: _change(
            connection, "DELETE FROM calendar WHERE id = ?", (given["id"],)
        ),
    ),
    "find_orders": Tool(
        "List orders whose customer or item contains a text.",
        {"text": str},
        lambda connection, given: _found(
            connection,
            "SELECT * FROM orders WHERE instr(lower(customer || char(10) || item), lower(?))",
            (given["text"],),
        ),
    ),
    "set_order_status": Tool(
        f"Give an order another status: {', '.join(STATUSES)}.",
        {"id": int, "status": str},
        lambda connection, given: _change(
            connection,
            "UPDATE orders SET status = ? WHERE id = ?",
            (_one_of(given["status"], STATUSES), given["id"]),
        ),
    ),
    "set_order_quantity": Tool(
        "Give an order another quantity.",
        {"id": int, "quantity": int},
        lambda connection, given: _change(
            connection,
            "UPDATE orders SET quantity = ? WHERE id = ?",
            (_positive(given["quantity"]), given["id"]),
        ),
    ),
}
