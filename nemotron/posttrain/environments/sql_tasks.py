"""Random databases of two tables, and questions about them with their queries."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from nemotron.posttrain.environments.sql import Database
from nemotron.posttrain.environments.words import CITIES, FIRST_NAMES, ITEMS


@dataclass(frozen=True)
class Theme:
    """Names of two tables, of which the second refers to the first."""

    parent: str
    place: str
    size: str
    child: str
    thing: str
    amount: str

    @property
    def key(self) -> str:
        """The column that refers to the parent."""
        return f"{self.parent.removesuffix('s')}_id"


THEMES = (
    Theme("customers", "city", "age", "orders", "item", "price"),
    Theme("authors", "country", "age", "books", "title", "pages"),
    Theme("drivers", "home", "experience", "trips", "cargo", "distance"),
    Theme("gardens", "town", "area", "plants", "kind", "height"),
)


@dataclass(frozen=True)
class SqlTask:
    """A question, its query, and whether the order of the rows counts."""

    question: str
    query: str
    is_ordered: bool = False


def make_database(rng: random.Random, theme: Theme, size: int) -> Database:
    """Return tables with `size` parents and three times as many children."""
    names = rng.sample(FIRST_NAMES, min(size, len(FIRST_NAMES)))
    places = rng.sample(CITIES, 4)
    parents = [
        [number + 1, name, rng.choice(places), rng.randint(18, 70)]
        for number, name in enumerate(names)
    ]
    children = [
        [
            number + 1,
            rng.randint(1, len(parents)),
            rng.choice(ITEMS[:8]),
            rng.randint(1, 500),
            rng.randint(2020, 2025),
        ]
        for number in range(3 * size)
    ]
    parent = {"id": "INTEGER", "name": "TEXT", theme.place: "TEXT", theme.size: "INTEGER"}
    child = {
        "id": "INTEGER",
        theme.key: "INTEGER",
        theme.thing: "TEXT",
        theme.amount: "INTEGER",
        "year": "INTEGER",
    }
    return {
        theme.parent: {"columns": parent, "rows": parents},
        theme.child: {"columns": child, "rows": children},
    }


def make_task(rng: random.Random, theme: Theme, database: Database, level: int) -> SqlTask:
    """Return a question of a level from 0 (one condition) to 4 (join, groups and order)."""
    return rng.choice(MAKERS[min(level, len(MAKERS) - 1)])(rng, theme, database)


def _value(rng: random.Random, database: Database, table: str, column: str) -> str:
    """Return a value that occurs in a column."""
    content = database[table]
    return str(rng.choice(content["rows"])[list(content["columns"]).index(column)])


def _names(rng: random.Random, t: Theme, database: Database) -> SqlTask:
    place = _value(rng, database, t.parent, t.place)
    query = f"SELECT name FROM {t.parent} WHERE {t.place} = '{place}'"
    return SqlTask(f"What are the names of the {t.parent} whose {t.place} is {place}?", query)


def _things(rng: random.Random, t: Theme, database: Database) -> SqlTask:
    amount = _value(rng, database, t.child, t.amount)
    query = f"SELECT DISTINCT {t.thing} FROM {t.child} WHERE {t.amount} >= {amount}"
    text = f"Which different values of {t.thing} have {t.child} whose {t.amount} is at least"
    return SqlTask(f"{text} {amount}?", query)


def _count(rng: random.Random, t: Theme, database: Database) -> SqlTask:
    year = _value(rng, database, t.child, "year")
    query = f"SELECT COUNT(*) FROM {t.child} WHERE year = {year}"
    return SqlTask(f"How many {t.child} are of the year {year}?", query)


def _sum(rng: random.Random, t: Theme, database: Database) -> SqlTask:
    thing = _value(rng, database, t.child, t.thing)
    word, function = rng.choice((("sum", "SUM"), ("largest value", "MAX"), ("average", "AVG")))
    query = f"SELECT {function}({t.amount}) FROM {t.child} WHERE {t.thing} = '{thing}'"
    text = f"What is the {word} of {t.amount} over the {t.child} whose {t.thing} is {thing}?"
    return SqlTask(text, query)


def _groups(rng: random.Random, t: Theme, database: Database) -> SqlTask:
    query = f"SELECT {t.thing}, SUM({t.amount}) FROM {t.child} GROUP BY {t.thing}"
    return SqlTask(f"List each {t.thing} with the sum of its {t.amount} over all {t.child}.", query)


def _top(rng: random.Random, t: Theme, database: Database) -> SqlTask:
    number = rng.randint(2, 4)
    order = f"ORDER BY {t.amount} DESC, id ASC LIMIT {number}"
    query = f"SELECT id, {t.amount} FROM {t.child} {order}"
    text = (
        f"List id and {t.amount} of the {number} {t.child} with the largest {t.amount}, "
        "the largest first, and among equal ones the smaller id first."
    )
    return SqlTask(text, query, is_ordered=True)


def _join(rng: random.Random, t: Theme, database: Database) -> SqlTask:
    thing = _value(rng, database, t.child, t.thing)
    join = f"JOIN {t.child} c ON c.{t.key} = p.id"
    query = f"SELECT DISTINCT p.name FROM {t.parent} p {join} WHERE c.{t.thing} = '{thing}'"
    text = f"What are the different names of the {t.parent} that have {t.child} whose {t.thing} is"
    return SqlTask(f"{text} {thing}?", query)


def _without(rng: random.Random, t: Theme, database: Database) -> SqlTask:
    year = _value(rng, database, t.child, "year")
    inner = f"SELECT {t.key} FROM {t.child} WHERE year = {year}"
    query = f"SELECT name FROM {t.parent} WHERE id NOT IN ({inner})"
    text = f"What are the names of the {t.parent} that have no {t.child} of the year {year}?"
    return SqlTask(text, query)


def _having(rng: random.Random, t: Theme, database: Database) -> SqlTask:
    number = rng.randint(2, 4)
    join = f"JOIN {t.child} c ON c.{t.key} = p.id"
    end = f"GROUP BY p.id HAVING COUNT(*) >= {number} ORDER BY SUM(c.{t.amount}) DESC, p.id ASC"
    query = f"SELECT p.name, SUM(c.{t.amount}) FROM {t.parent} p {join} {end}"
    text = (
        f"List the {t.parent} that have at least {number} {t.child}, by name and the sum of "
        f"{t.amount}, the largest sum first, and among equal ones the smaller id first."
    )
    return SqlTask(text, query, is_ordered=True)


def _above(rng: random.Random, t: Theme, database: Database) -> SqlTask:
    year = _value(rng, database, t.child, "year")
    average = f"SELECT AVG({t.amount}) FROM {t.child} WHERE year = {year}"
    query = (
        f"SELECT p.{t.place}, COUNT(*) FROM {t.parent} p JOIN {t.child} c ON c.{t.key} = p.id "
        f"WHERE c.{t.amount} > ({average}) GROUP BY p.{t.place}"
    )
    text = (
        f"For each {t.place} of the {t.parent}, how many {t.child} have a {t.amount} above the "
        f"average {t.amount} of the year {year}? List {t.place} and number."
    )
    return SqlTask(text, query)


Make = Callable[[random.Random, Theme, Database], SqlTask]
MAKERS: tuple[tuple[Make, ...], ...] = (
    (_names, _things),
    (_count, _sum),
    (_groups, _top),
    (_join, _without),
    (_having, _above),
)
