"""Documents that fit a schema, that do not, and that try to fit without being one."""

import json
from typing import Any

import pytest

pytest.importorskip("jsonschema", reason="the package jsonschema is not installed")

from nemotron.posttrain.environments.base import BadRow, Response, Row, build_row
from nemotron.posttrain.environments.json_schema import JsonSchema, strict
from tests.support.verdicts import (
    assert_enough,
    assert_good_rows,
    calls,
    judge,
    rows_elsewhere,
    rows_here,
)

INNER = {"type": "object", "properties": {"item": {"type": "string"}, "count": {"type": "integer"}}}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2},
        "age": {"type": "integer", "minimum": 0},
        "tags": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
        "note": {"type": ["string", "null"]},
        "content": {"type": "array", "items": INNER},
    },
}
GOOD = {"name": "Ada", "age": 36, "tags": ["a"], "note": None, "content": []}
TEXT = json.dumps(GOOD)
YAML = "name: Ada\nage: 36\ntags: [a]\nnote: null\ncontent: []\n"


def but(**changes: Any) -> str:
    return json.dumps({**GOOD, **changes})


def without(key: str) -> str:
    return json.dumps({name: value for name, value in GOOD.items() if name != key})


# kind of answer, answer
RIGHT: list[tuple[str, str | Response]] = [
    ("json", TEXT),
    ("json", f"\n  {TEXT}\n"),
    ("json", json.dumps(GOOD, indent=4)),
    ("json", json.dumps(dict(reversed(GOOD.items())))),
    ("json", but(age=0)),
    ("json", but(age=10**20)),
    ("json", but(age=36.0)),
    ("json", but(tags=[])),
    ("json", but(tags=["a", "b"])),
    ("json", but(note="x")),
    ("json", but(note="")),
    ("json", but(name="Åsa 中")),
    ("json", but(content=[{"item": "x", "count": 1}, {"item": "", "count": -1}])),
    ("json", TEXT.replace("Ada", "\\u0041da")),
    ("yaml", YAML),
    ("yaml", TEXT),
    ("yaml", f"---\n{YAML}"),
    ("yaml", f"# a comment\n{YAML}"),
    ("yaml", YAML.replace("Ada", "'Ada'")),
    ("yaml", YAML.replace("[a]", "\n  - a\n  - b")),
    ("yaml", YAML.replace("content: []", "content:\n  - item: x\n    count: 2")),
    ("yaml", YAML.replace("null", "~")),
    ("tool", calls(("submit", GOOD))),
    ("tool", calls(("submit", TEXT), text="")),
]
WRONG: list[tuple[str, str | Response]] = [
    ("json", without("name")),
    ("json", without("age")),
    ("json", without("note")),
    ("json", without("content")),
    ("json", but(name="A")),
    ("json", but(name=3)),
    ("json", but(age="36")),
    ("json", but(age=36.5)),
    ("json", but(age=-1)),
    ("json", but(age=True)),
    ("json", but(age=None)),
    ("json", but(tags="a")),
    ("json", but(tags=["a", "a"])),
    ("json", but(tags=[1])),
    ("json", but(note=3)),
    ("json", but(content=[{"item": "x"}])),
    ("json", but(content=[{"item": "x", "count": "1"}])),
    ("json", f"[{TEXT}]"),
    ("json", YAML),
    ("json", TEXT[:-1]),
    ("json", TEXT.replace('"', "'")),
    ("yaml", YAML.replace("36", "old")),
    ("yaml", YAML.replace("Ada", "[Ada")),
    ("tool", TEXT),
    ("tool", calls(("submit", without("age")))),
    ("tool", calls(("submit", TEXT[:-1]))),
    ("tool", calls(("send", GOOD))),
]
HACKS: list[tuple[str, str | Response]] = [
    ("json", ""),
    ("json", "{}"),
    ("json", "null"),
    ("json", json.dumps(SCHEMA)),
    ("json", f"```json\n{TEXT}\n```"),
    ("json", f"Here it is: {TEXT}"),
    ("json", f"{TEXT}{TEXT}"),
    ("json", but(extra=1)),
    ("json", but(content=[{"item": "x", "count": 1, "more": 2}])),
    ("json", TEXT[:-1] + ', "age": 37}'),
    ("json", TEXT.replace("36", "NaN")),
    ("json", TEXT.replace("36", "Infinity")),
    ("json", "[" * 50_000),
    ("json", '{"a":' * 5_000),
    ("yaml", f"{YAML}---\n{YAML}"),
    ("yaml", "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]"),
    ("yaml", YAML + "age: 37\n"),
    ("yaml", YAML.replace("age", "36")),
    ("yaml", YAML.replace("36", ".inf")),
    ("yaml", YAML + "1: 2\n"),
    ("yaml", YAML.replace("Ada", "!!python/object/apply:os.getcwd []")),
    ("yaml", "- " * 3_000),
    ("tool", calls(("submit", GOOD), ("submit", GOOD))),
    ("tool", calls(("submit", {}))),
    ("tool", calls(("submit", "null"))),
]


def row(kind: str) -> Row:
    text = json.dumps(SCHEMA)
    if kind == "tool":
        return build_row("json_schema", "?", schema_str=text, mode="tool")
    return build_row("json_schema", "?", schema_str=text, schema_type=kind)


@pytest.mark.parametrize(("kind", "answer"), RIGHT)
def test_a_document_that_fits_earns_one(kind: str, answer: str | Response):
    assert judge(JsonSchema(), row(kind), answer) == 1


@pytest.mark.parametrize(("kind", "answer"), [*WRONG, *HACKS])
def test_any_other_answer_earns_nothing(kind: str, answer: str | Response):
    assert judge(JsonSchema(), row(kind), answer) == 0


def test_the_tables_are_long_enough():
    assert_enough(RIGHT, WRONG, HACKS)


@pytest.mark.parametrize(
    ("calls", "reward"),
    [
        ([("extract", {"found": {"name": "Rome", "size": 3}})], 1.0),
        ([("extract", {"found": {"name": "Rome"}})], 0.0),
        ([("extract", {"name": "Rome", "size": 3})], 0.0),
        ([("extract", ["found"])], 0.0),
        ([("other", {"found": {"name": "Rome", "size": 3}})], 0.0),
        ([("extract", {"found": {"name": "Rome", "size": 3}})] * 2, 0.0),
        ([], 0.0),
    ],
)
def test_rows_of_gym_may_ask_for_the_call_of_a_tool(calls: list[tuple[str, Any]], reward: float):
    """`tools/gym_verdicts.py` compares the same forms with the server of NeMo Gym."""
    kinds = {"name": {"type": "string"}, "size": {"type": "integer"}}
    asked = {"response_mode": "tool_call", "tool_name": "extract", "tool_payload_key": "found"}
    schema = json.dumps({"type": "object", "properties": kinds})
    row = build_row("json_schema", "What is it?", schema_str=schema, **asked)
    output = tuple(
        {"type": "function_call", "name": name, "arguments": json.dumps(given), "call_id": "c"}
        for name, given in calls
    )
    text = json.dumps({"name": "Rome", "size": 3})
    assert judge(JsonSchema(), row, Response(text, output=output)) == reward
    whole = {key: value for key, value in row.items() if key != "tool_payload_key"}
    made = {**output[0], "arguments": text} if output else None
    if made and made["name"] == "extract" and len(output) == 1:
        assert judge(JsonSchema(), whole, Response("", output=(made,))) == 1.0


def test_older_rows_of_gym_load():
    older = {"responses_create_params": {"input": "?"}, "schema": json.dumps(SCHEMA)}
    older |= {"schema_type": "json", "schema_fields_count": "5"}
    assert judge(JsonSchema(), older, TEXT) == 1
    assert judge(JsonSchema(), older, without("age")) == 0


def test_rows_are_good():
    assert_good_rows(JsonSchema())
    assert rows_elsewhere(["json_schema"]) == rows_here(["json_schema"])


def test_rows_of_mode_tool_offer_the_schema_as_parameters():
    rows = list(JsonSchema().rows(60, 1, 1))
    modes = {each["mode"] for each in rows}
    assert modes == {"text", "tool"}
    for each in rows:
        tools = each["responses_create_params"]["tools"]
        expected = [strict(json.loads(each["schema_str"]))] if each["mode"] == "tool" else []
        assert [tool["parameters"] for tool in tools] == expected


def test_only_schemas_become_strict_not_properties_of_that_name():
    schema = {"type": "object", "properties": {"properties": {"type": "object"}}}
    made = strict(schema)
    assert made["required"] == ["properties"]
    assert made["properties"] == {"properties": {"type": "object"}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema_str": "{"}, "schema_str is not a JSON Schema"),
        ({"schema_str": '{"type": "text"}'}, "schema_str is not a JSON Schema"),
        ({"schema_str": {"type": "object"}}, "schema_str is not a JSON Schema"),
        ({"schema_str": '{"$ref": "http://localhost/x.json"}'}, "refers to another document"),
        ({"schema_str": '{"items": {"$ref": "other.json"}}'}, "refers to another document"),
        ({"schema_type": "toml"}, "schema_type = 'toml'"),
        ({"mode": "speech"}, "mode = 'speech'"),
    ],
)
def test_a_row_that_cannot_be_judged_is_refused(changes: dict[str, Any], said: str):
    with pytest.raises(BadRow, match=said):
        JsonSchema().check({**row("json"), **changes})
    with pytest.raises(BadRow, match="schema_str is absent"):
        JsonSchema().check(build_row("json_schema", "?"))
