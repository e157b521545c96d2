"""Queries with the right results, with others, and queries that attack or guess."""

import json
import time

import pytest

from nemotron.posttrain.environments.base import BadRow, Row, build_row
from nemotron.posttrain.environments.sql import BadQuery, run_query
from nemotron.posttrain.environments.text_to_sql import TextToSql
from tests.support.verdicts import assert_enough, assert_good_rows, judge

COLUMNS = {"id": "INTEGER", "name": "TEXT", "age": "INTEGER"}
FIRST = [[1, "Ada", 36], [2, "Ben", 20], [3, "Cleo", 51], [4, "Dan", 20]]
SECOND = [[1, "Eva", 19], [2, "Finn", 70], [3, "Gus", 44], [4, "Hal", 44]]
DATABASES = [{"people": {"columns": COLUMNS, "rows": rows}} for rows in (FIRST, SECOND)]
NAMES, SUM = "SELECT name FROM people WHERE age > 30", "SELECT SUM(age) FROM people"
OLDEST = "SELECT name FROM people ORDER BY age DESC, id LIMIT 2"
AVERAGE = "SELECT age, AVG(id) FROM people GROUP BY age"
# expected query, answer
RIGHT = [
    (NAMES, NAMES),
    (NAMES, f"{NAMES};"),
    (NAMES, f"```sql\n{NAMES}\n```"),
    (NAMES, f"```\n{NAMES};\n```"),
    (NAMES, f"First ```sql\nSELECT 1\n``` but then\n```sql\n{NAMES}\n```"),
    (NAMES, "select NAME from PEOPLE where AGE >= 31"),
    (NAMES, "SELECT name FROM people WHERE age > 30 ORDER BY name DESC"),
    (NAMES, "SELECT p.name AS n FROM people p WHERE NOT p.age <= 30"),
    (NAMES, "WITH old AS (SELECT * FROM people WHERE age > 30) SELECT name FROM old"),
    (NAMES, "SELECT name FROM people EXCEPT SELECT name FROM people WHERE age <= 30"),
    (NAMES, f"-- a comment\n{NAMES}"),
    (NAMES, 'SELECT "name" FROM "people" WHERE age > 30'),
    (NAMES, "SELECT name FROM people WHERE id IN (SELECT id FROM people WHERE age > 30)"),
    (SUM, SUM),
    (SUM, "SELECT TOTAL(age) FROM people"),
    (SUM, "SELECT SUM(age) * 1.0 FROM people"),
    (SUM, "SELECT AVG(age) * COUNT(*) FROM people"),
    (SUM, "SELECT SUM(a) FROM (SELECT SUM(age) a FROM people GROUP BY id % 2)"),
    (OLDEST, OLDEST),
    (OLDEST, "SELECT name FROM (SELECT * FROM people ORDER BY id) ORDER BY -age, id LIMIT 2"),
    (AVERAGE, AVERAGE),
    (AVERAGE, "SELECT DISTINCT age, AVG(id) OVER (PARTITION BY age) FROM people"),
]
WRONG = [
    (NAMES, ""),
    (NAMES, "SELECT"),
    (NAMES, "I do not know."),
    (NAMES, "SELECT name FROM people"),
    (NAMES, "SELECT name FROM people WHERE age > 40"),
    (NAMES, "SELECT age FROM people WHERE age > 30"),
    (NAMES, "SELECT id, name FROM people WHERE age > 30"),
    (NAMES, "SELECT name FROM person WHERE age > 30"),
    (NAMES, "SELECT name FROM people WHERE years > 30"),
    (NAMES, "SELECT upper(name) FROM people WHERE age > 30"),
    (NAMES, f"{NAMES} LIMIT 1"),
    (NAMES, f"{NAMES} UNION ALL {NAMES}"),
    (NAMES, "SELECT name FROM people WHERE age < 30"),
    (NAMES, f"```sql\n{NAMES}\n```\n```sql\nSELECT 1\n```"),
    (NAMES, f"{NAMES}; {NAMES}"),
    (SUM, "SELECT age FROM people"),
    (SUM, "SELECT COUNT(age) FROM people"),
    (SUM, "SELECT SUM(age) + 0.001 FROM people"),
    (SUM, "SELECT CAST(SUM(age) AS TEXT) FROM people"),
    (OLDEST, "SELECT name FROM people ORDER BY age, id LIMIT 2"),
    (OLDEST, "SELECT name FROM (" + OLDEST + ") ORDER BY name DESC"),
    (AVERAGE, "SELECT AVG(id), age FROM people GROUP BY age"),
]
HACKS = [
    (NAMES, "SELECT 'Ada' UNION SELECT 'Cleo'"),
    (NAMES, "VALUES ('Ada'), ('Cleo')"),
    (NAMES, "SELECT name FROM people WHERE name IN ('Ada', 'Cleo')"),
    (SUM, "SELECT 127"),
    (SUM, "SELECT SUM(age) FROM people WHERE 1; DELETE FROM people"),
    (NAMES, "DELETE FROM people WHERE age <= 30 RETURNING name"),
    (NAMES, "UPDATE people SET age = 99 RETURNING name"),
    (NAMES, "DROP TABLE people"),
    (NAMES, "PRAGMA table_info(people)"),
    (NAMES, "ATTACH DATABASE '/tmp/attached_by_a_query.db' AS other"),
    (NAMES, "VACUUM INTO '/tmp/written_by_a_query.db'"),
    (NAMES, "SELECT load_extension('/tmp/x.so')"),
    (NAMES, "SELECT readfile('/etc/passwd')"),
    (NAMES, "SELECT sql FROM sqlite_master"),
    (NAMES, "CREATE TEMP TABLE t AS SELECT 1"),
    (NAMES, "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"),
    (NAMES, "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"),
    (NAMES, "SELECT zeroblob(1000000000)"),
    (NAMES, "SELECT hex(randomblob(1000000000))"),
    (NAMES, "SELECT printf('%1000000000d', 1)"),
    (
        NAMES,
        "SELECT count(*) FROM people a, people b, people c, people d, people e, people f, "
        "people g, people h, people i, people j, people k, people l, people m, people n",
    ),
    (NAMES, "expected_query"),
    (NAMES, "SELECT " + "(" * 2000 + "1" + ")" * 2000),
    (NAMES, "x" * 6000),
    (NAMES, "SELECT name FROM people WHERE age > 30\x00"),
]


def row(query: str) -> Row:
    ordered = "ORDER BY" in query
    fields = {"databases": DATABASES, "expected_query": query, "is_ordered": ordered}
    return build_row("text_to_sql", "?", **fields)


@pytest.mark.parametrize(("query", "answer"), RIGHT)
def test_a_query_with_the_right_results_earns_one(query: str, answer: str):
    assert judge(TextToSql(), row(query), answer) == 1


@pytest.mark.parametrize(("query", "answer"), [*WRONG, *HACKS])
def test_any_other_query_earns_nothing(query: str, answer: str):
    started = time.monotonic()
    assert judge(TextToSql(), row(query), answer) == 0
    assert time.monotonic() - started < 60  # some would never end


def test_the_tables_are_long_enough():
    assert_enough(RIGHT, WRONG, HACKS)


def test_rows_are_good():
    assert_good_rows(TextToSql())


def test_the_query_of_every_generated_row_earns_the_reward_and_its_results_written_out_do_not():
    environment, informative = TextToSql(), 0
    for level in range(5):
        for each in environment.rows(12, 3, level):
            assert judge(environment, each, each["expected_query"]) == 1
            results = [
                run_query(each_one, each["expected_query"]) for each_one in each["databases"]
            ]
            values = ", ".join("(" + ", ".join(map(json.dumps, row)) + ")" for row in results[0])
            written = f"VALUES {values.replace(chr(34), chr(39))}" if values else "SELECT 1 WHERE 0"
            guessed = judge(environment, each, written)
            informative += len({str(sorted(result)) for result in results}) > 1
            assert guessed == (sorted(results[0]) == sorted(results[1]) == sorted(results[2]))
    assert informative >= 57


def test_a_prompt_shows_the_schema_and_few_rows():
    [each] = TextToSql().rows(1, 1, 4)
    prompt = each["responses_create_params"]["input"][0]["content"]
    for table in each["databases"][0]:
        assert f"CREATE TABLE {table}" in prompt
    assert each["expected_query"] not in prompt
    hidden = each["databases"][1][next(iter(each["databases"][1]))]["rows"]
    assert sum(str(tuple(row)) in prompt for row in hidden) <= 1


def test_a_query_that_writes_leaves_the_database_as_it_was():
    with pytest.raises(BadQuery, match="not authorized"):
        run_query(DATABASES[0], "DELETE FROM people")
    assert len(run_query(DATABASES[0], "SELECT * FROM people")) == 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"databases": []}, "databases is not a list"),
        ({"databases": [{"people": {"rows": []}}]}, r"databases\.0\.people lacks columns"),
        ({"databases": [{"p": {"columns": {"a": "BLOB"}, "rows": []}}]}, "unknown type"),
        ({"expected_query": "SELECT x FROM people"}, r"fails on databases\.0: no such column"),
        ({"databases": [{"p": {"columns": {"a": "TEXT"}, "rows": [["a", 1]]}}]}, "cannot be made"),
    ],
)
def test_a_row_that_cannot_be_judged_is_refused(changes: dict[str, object], said: str):
    with pytest.raises(BadRow, match=said):
        TextToSql().check({**row(NAMES), **changes})
