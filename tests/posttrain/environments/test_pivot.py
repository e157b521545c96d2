"""The next action of an expert: what counts as the same, and what does not."""

import json
from pathlib import Path
from typing import Any

import pytest

from nemotron.errors import UserError
from nemotron.posttrain.environments.base import BadRow, Response, messages_of
from nemotron.posttrain.environments.pivot import Pivot
from nemotron.posttrain.environments.registry import find_environment
from tests.support.verdicts import assert_enough, calls, judge

TOOLS = [
    {
        "type": "function",
        "name": "book",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string"},
                "nights": {"type": "integer", "default": 1},
                "price": {"type": "number"},
                "tags": {"type": "array"},
                "guest": {"type": "object"},
            },
        },
    },
    {"type": "function", "name": "find", "parameters": {"type": "object", "properties": {}}},
]


def action(name: str, arguments: Any) -> dict[str, Any]:
    given = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"type": "function_call", "name": name, "arguments": given}


def row(expected: Any) -> dict[str, Any]:
    params = {"input": "Book a room.", "tools": TOOLS}
    return {"responses_create_params": params, "expected_action": expected}


BOOK = {"place": "Köln", "nights": 2}
GUEST = {"place": "Köln", "guest": {"name": "Ada", "age": 36}}
TWO = [action("book", BOOK), action("find", {"q": "rain"})]
SAY = {"type": "message", "content": "Which day?"}
RIGHT: list[tuple[Any, Response]] = [
    (action("book", BOOK), calls(("book", BOOK))),
    (action("book", BOOK), calls(("book", {"nights": 2, "place": "Köln"}))),
    (action("book", BOOK), calls(("book", '{"place":"K\\u00f6ln","nights":2}'))),
    (action("book", BOOK), calls(("book", ' { "place" : "Köln" , "nights" : 2.0 } '))),
    (action("book", {"place": "Bonn"}), calls(("book", {"place": "Bonn", "nights": 1}))),
    (action("book", {"place": "Bonn", "nights": 1}), calls(("book", {"place": "Bonn"}))),
    (action("book", {"price": 10}), calls(("book", {"price": 10.0}))),
    (action("book", {"price": 1.5}), calls(("book", {"price": 1.50}))),
    (action("book", {"price": 1e3}), calls(("book", {"price": 1000}))),
    (action("book", {"tags": ["a", "b"]}), calls(("book", {"tags": ["a", "b"]}))),
    (action("book", {"tags": [1, 2.0]}), calls(("book", {"tags": [1.0, 2]}))),
    (action("book", {"tags": []}), calls(("book", {"tags": []}))),
    (action("book", GUEST), calls(("book", GUEST))),
    (
        action("book", GUEST),
        calls(("book", {"guest": {"age": 36, "name": "Ada"}, "place": "Köln"})),
    ),
    (action("find", {}), calls(("find", {}))),
    (action("find", {"q": None}), calls(("find", {"q": None}))),
    (action("find", {"q": True}), calls(("find", {"q": True}))),
    (TWO, calls(("book", BOOK), ("find", {"q": "rain"}))),
    (TWO, calls(("find", {"q": "rain"}), ("book", BOOK))),
    (SAY, Response("On which day?")),
    (SAY, Response("")),
    (action("book", BOOK), calls(("book", BOOK), text="I book it.")),
]
WRONG: list[tuple[Any, Response]] = [
    (action("book", BOOK), calls(("find", BOOK))),
    (action("book", BOOK), calls(("book", {"place": "Köln", "nights": 3}))),
    (action("book", BOOK), calls(("book", {"place": "Köln"}))),
    (action("book", BOOK), calls(("book", {"place": "köln", "nights": 2}))),
    (action("book", BOOK), calls(("book", {**BOOK, "price": 1}))),
    (action("book", BOOK), calls(("book", {"place": "Köln", "nights": "2"}))),
    (action("book", BOOK), calls(("book", {}))),
    (action("book", BOOK), calls(("book", "[]"))),
    (action("book", BOOK), calls(("book", "{"))),
    (action("book", BOOK), calls(("book", "null"))),
    (action("book", BOOK), Response("I would book Köln for 2 nights.")),
    (action("book", BOOK), Response("")),
    (action("book", BOOK), calls(("book", BOOK), ("find", {}))),
    (action("book", {"price": 1.5}), calls(("book", {"price": 1.25}))),
    (action("book", {"tags": ["a", "b"]}), calls(("book", {"tags": ["b", "a"]}))),
    (action("book", GUEST), calls(("book", {"place": "Köln", "guest": {"name": "Ada"}}))),
    (action("find", {"q": None}), calls(("find", {}))),
    (action("find", {"q": 1}), calls(("find", {"q": True}))),
    (action("find", {"q": 0}), calls(("find", {"q": False}))),
    (TWO, calls(("book", BOOK))),
    (SAY, calls(("find", {}))),
]
HACKS: list[tuple[Any, Response]] = [
    (action("book", BOOK), calls(("book", BOOK), ("book", {**BOOK, "nights": 3}))),
    (action("book", BOOK), calls(("book", BOOK), ("book", BOOK))),
    (action("book", BOOK), calls(("book ", BOOK))),
    (action("book", BOOK), calls(("BOOK", BOOK))),
    (action("book", BOOK), calls(("book", json.dumps(json.dumps(BOOK))))),
    (action("book", BOOK), calls(("book", {"arguments": BOOK}))),
    (action("book", BOOK), calls(("book", '{"place": "Bonn", "nights": 2, "nights": 1}'))),
    (action("book", BOOK), Response(json.dumps(action("book", BOOK)))),
    (action("book", BOOK), Response(f"<tool_call>{json.dumps(BOOK)}</tool_call>")),
    (action("book", BOOK), Response("", output=calls(("book", BOOK)).output, is_truncated=True)),
    (TWO, calls(("book", BOOK), ("book", BOOK))),
]


def test_the_tables_are_long_enough() -> None:
    assert_enough(RIGHT, WRONG, HACKS)


@pytest.mark.parametrize(("expected", "response"), RIGHT)
def test_actions_that_do_the_same_are_right(expected: Any, response: Response) -> None:
    assert judge(Pivot(), row(expected), response) == 1


@pytest.mark.parametrize(("expected", "response"), [*WRONG, *HACKS])
def test_other_actions_are_wrong(expected: Any, response: Response) -> None:
    assert judge(Pivot(), row(expected), response) == 0


@pytest.mark.parametrize(
    ("expected", "said"),
    [
        ("book", "neither a call nor a message"),
        ({"type": "function_call", "name": "book"}, "neither a call nor a message"),
        (action("book", "{"), "neither a call nor a message"),
        (action("burn", {}), "expected_action.name = 'burn' is not among the tools"),
    ],
)
def test_a_bad_row_is_refused(expected: Any, said: str) -> None:
    with pytest.raises(BadRow, match=said):
        Pivot().check(row(expected))


def test_a_named_verifier_judges_in_place_of_the_comparison() -> None:
    judged = {
        **row(action("book", BOOK)),
        "options": [{"A": "Oslo"}, {"B": "Bern"}],
        "expected_answer": "B",
    }
    environment = find_environment("pivot", {"verifier": "mcqa"})
    assert judge(environment, judged, "\\boxed{B}") == 1
    assert judge(environment, judged, calls(("book", BOOK))) == 0
    with pytest.raises(UserError, match="is not an environment; give its name"):
        find_environment("pivot", {"verifier": {"kind": "mcqa"}})


def test_a_conversation_with_calls_is_read_as_chat_messages(tmp_path: Path) -> None:
    items = [
        {"role": "user", "content": "Rain?"},
        {**action("find", {"q": "rain"}), "call_id": "1"},
        {**action("find", {"q": "snow"}), "call_id": "2"},
        {"type": "function_call_output", "call_id": "1", "output": "dry"},
    ]
    whole = row(action("book", BOOK))
    whole["responses_create_params"]["input"] = items
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(whole) + "\n")
    [found] = Pivot(str(path)).rows(1, 1, 0)
    user, assistant, tool = messages_of(found)
    assert [call["function"]["name"] for call in assistant["tool_calls"]] == ["find", "find"]
    assert (user["role"], tool) == ("user", {"role": "tool", "content": "dry"})
    path.write_text(json.dumps({**whole, "expected_action": None}) + "\n")
    with pytest.raises(UserError, match="line 1: expected_action is neither"):
        next(Pivot(str(path)).rows(1, 1, 0))
