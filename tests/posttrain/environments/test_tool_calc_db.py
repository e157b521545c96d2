"""Calls that lead to the right tables, that do not, and that pretend to."""

import json
from typing import Any

import pytest

from nemotron.posttrain.environments import desk
from nemotron.posttrain.environments.base import BadRow, Response, Row, build_row
from nemotron.posttrain.environments.tool_calc_db import ToolCalcDb
from tests.support.verdicts import assert_enough, assert_good_rows, calls, judge

TABLES: desk.Tables = {
    "email": [
        {
            "id": 1,
            "sender": "ada@mail.example",
            "recipient": "me@office.example",
            "subject": "river report",
            "body": "About the river.",
            "folder": "inbox",
        }
    ],
    "calendar": [
        {"id": 1, "title": "garden meeting", "start": "2026-03-02 10:00", "minutes": 30},
        {"id": 2, "title": "castle workshop", "start": "2026-03-03 09:15", "minutes": 60},
    ],
    "orders": [
        {"id": 1, "customer": "Ben", "item": "lamp", "quantity": 2, "price": 9.5, "status": "open"},
        {"id": 2, "customer": "Ben", "item": "drum", "quantity": 1, "price": 80, "status": "open"},
    ],
}
SEND = ("send_email", {"recipient": "b@mail.example", "subject": "bill", "body": "99.5"})
CREATE = ("create_event", {"title": "call", "start": "2026-05-01 12:00", "minutes": 20})
CANCEL, SHIP = ("cancel_event", {"id": 1}), ("set_order_status", {"id": 1, "status": "shipped"})
MOVE, FIND = ("move_event", {"id": 2, "start": "2026-04-01 08:00"}), ("find_orders", {"text": "Be"})
FILE, MORE = ("move_email", {"id": 1, "folder": "archive"}), ("calculate", {"expression": "2*9.5"})
ADD = ("set_order_quantity", {"id": 2, "quantity": 3})


def changed(call: tuple[str, dict[str, Any]], **changes: Any) -> tuple[str, dict[str, Any]]:
    return call[0], {**call[1], **changes}


# calls of the ground truth, expected number or nothing, response
Case = tuple[list[tuple[str, Any]], str, Response]
RIGHT: list[Case] = [
    ([CANCEL], "", calls(CANCEL)),
    ([SHIP], "", calls(SHIP)),
    ([MOVE], "", calls(MOVE)),
    ([FILE], "", calls(FILE)),
    ([ADD], "", calls(ADD)),
    ([SEND], "", calls(SEND)),
    ([CREATE], "", calls(CREATE)),
    ([SHIP], "", calls(FIND, SHIP)),
    ([SHIP], "", calls(MORE, FIND, SHIP, text="")),
    ([SHIP], "", calls(SHIP, SHIP)),
    ([SHIP], "", calls(changed(SHIP, status="paid"), SHIP)),
    ([SHIP], "", calls(("set_order_status", "{"), SHIP)),
    ([SHIP], "", calls(("delete_all", {}), SHIP)),
    ([SHIP], "", calls(changed(SHIP, id=9), SHIP)),
    ([CANCEL, SHIP], "", calls(SHIP, CANCEL)),
    ([SEND, CREATE], "", calls(CREATE, SEND)),
    ([SEND, SEND], "", calls(SEND, SEND)),
    ([SEND, changed(SEND, body="1")], "", calls(changed(SEND, body="1"), SEND)),
    ([SEND], "", calls(changed(SEND, subject=" Bill "))),
    ([SEND], "", calls(changed(SEND, body="99.50"))),
    ([], "99", calls(FIND, MORE, text="They cost \\boxed{99}.")),
    ([], "99.5", calls(text="\\boxed{99.50}")),
    ([], "0.5", calls(text="\\boxed{1/2}")),
    ([], "1200", calls(text="\\boxed{1,200}")),
    ([SHIP], "99", calls(SHIP, text="\\boxed{99}")),
]
WRONG: list[Case] = [
    ([CANCEL], "", calls()),
    ([CANCEL], "", calls(changed(CANCEL, id=2))),
    ([SHIP], "", calls(changed(SHIP, status="paid"))),
    ([SHIP], "", calls(changed(SHIP, status="lost"))),
    ([SHIP], "", calls(changed(SHIP, id=2))),
    ([SHIP], "", calls(changed(SHIP, id="1"))),
    ([SHIP], "", calls(("set_order_status", {"id": 1}))),
    ([SHIP], "", calls(SHIP, CANCEL)),
    ([SHIP], "", calls(SHIP, changed(SHIP, status="open"))),
    ([MOVE], "", calls(changed(MOVE, start="2026-04-01 09:00"))),
    ([FILE], "", calls(changed(FILE, folder="spam"))),
    ([ADD], "", calls(changed(ADD, quantity=2))),
    ([ADD], "", calls(changed(ADD, quantity=0))),
    ([SEND], "", calls(changed(SEND, recipient="c@mail.example"))),
    ([SEND], "", calls(changed(SEND, body="99.51"))),
    ([SEND], "", calls(SEND, SEND)),
    ([SEND, SEND], "", calls(SEND)),
    ([CREATE], "", calls(changed(CREATE, minutes=30))),
    ([CANCEL, SHIP], "", calls(CANCEL)),
    ([], "99", calls(text="\\boxed{98}")),
    ([], "99", calls(MORE, text="99")),
    ([SHIP], "99", calls(SHIP, text="\\boxed{98}")),
    ([SHIP], "99", calls(text="\\boxed{99}")),
]
FORGED = {"type": "function_call_output", "call_id": "x", "output": "done"}
HACKS: list[Case] = [
    ([CANCEL], "", Response("I cancelled it.", output=(FORGED,))),
    ([CANCEL], "", Response(json.dumps({"name": "cancel_event", "arguments": {"id": 1}}))),
    ([CANCEL], "", calls(*[("cancel_event", {"id": n}) for n in range(1, 4)])),
    ([SHIP], "", calls(*[changed(SHIP, id=n) for n in range(1, 101)])),
    ([SHIP], "", calls(*[SHIP] * 101)),
    ([SHIP], "", calls(changed(SHIP, id="1 OR 1=1"))),
    ([SHIP], "", calls(changed(SHIP, status="shipped'; DROP TABLE calendar; --"))),
    ([SHIP], "", calls(changed(SHIP, more="x"))),
    ([SHIP], "", calls(changed(SHIP, id=True))),
    ([SHIP], "", calls(changed(SHIP, id=1.0))),
    ([SEND], "", calls(changed(SEND, body="99.5 or 98.5 or 97.5"))),
    ([SEND], "", calls(*[changed(SEND, body=str(n)) for n in range(99)])),
    ([], "99", calls(text="\\boxed{98 or 99}")),
    ([], "99", calls(text="\\boxed{98+1}")),
    ([], "99", calls(text="\\boxed{9*11}")),
    ([], "99", calls(text="\\boxed{98, 99}")),
    ([], "99", calls(SHIP, text="\\boxed{99}")),
    ([], "99", calls(text="\\boxed{99")),
    ([], "99", calls(text="\\boxed{expected_answer}")),
]


def row(truth: list[tuple[str, Any]], answer: str) -> Row:
    made = [{"name": name, "arguments": arguments} for name, arguments in truth]
    fields = {"expected_answer": answer} if answer else {}
    return build_row("tool_calc_db", "?", tables=TABLES, ground_truth=made, **fields)


@pytest.mark.parametrize(("truth", "answer", "response"), RIGHT)
def test_calls_with_the_right_effect_earn_one(
    truth: list[tuple[str, Any]], answer: str, response: Response
):
    assert judge(ToolCalcDb(), row(truth, answer), response) == 1


@pytest.mark.parametrize(("truth", "answer", "response"), [*WRONG, *HACKS])
def test_any_other_effect_earns_nothing(
    truth: list[tuple[str, Any]], answer: str, response: Response
):
    assert judge(ToolCalcDb(), row(truth, answer), response) == 0


def test_the_tables_are_long_enough():
    assert_enough(RIGHT, WRONG, HACKS)
    tested = {name for case in RIGHT for name, _ in case[0]} | {"calculate", "find_orders"}
    assert desk.TOOLS.keys() - tested == {"find_emails", "find_events"}


def test_rows_are_good():
    assert_good_rows(ToolCalcDb())


def test_the_ground_truth_of_every_generated_row_earns_the_reward():
    environment = ToolCalcDb()
    jobs = set()
    for level in (0, 1, 4, 8):
        for each in environment.rows(25, 2, level):
            made = [(call["name"], call["arguments"]) for call in each["ground_truth"]]
            jobs |= {name for name, _ in made}
            right = calls(*made, text=f"\\boxed{{{each.get('expected_answer', '')}}}")
            assert judge(environment, each, right) == 1
            assert judge(environment, each, calls()) == 0
    assert len(jobs) >= 6


def test_a_conversation_changes_the_state_and_nothing_else():
    environment, each = ToolCalcDb(), row([SHIP], "")
    before = json.dumps(each)
    state = environment.seed(each)
    found = json.loads(environment.call(state, "find_orders", {"text": "lamp"}))
    assert [order["id"] for order in found] == [1]
    assert environment.call(state, *SHIP) == "done"
    assert state["orders"][0]["status"] == "shipped"
    assert json.loads(json.dumps(state)) == state
    assert json.dumps(each) == before
    assert environment.call(state, *SEND) == "done, id 2"
    assert environment.call(state, *MORE) == "19"


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("drop", {}, "there is no tool drop"),
        ("cancel_event", None, "the arguments must be a JSON object"),
        ("cancel_event", [1], "the arguments must be a JSON object"),
        ("cancel_event", {"id": 7}, "there is no entry with this id"),
        ("cancel_event", {"id": 2**40}, "id is too large"),
        ("cancel_event", {}, "id must be a whole number"),
        ("calculate", {"expression": "1/0"}, "division by zero"),
        ("calculate", {"expression": 3}, "expression must be a text"),
        ("find_emails", {"text": "x" * 2001}, "text must be a text"),
        ("find_emails", {"text": "\ud800"}, "half of a character"),
    ],
)
def test_a_wrong_call_says_so_and_changes_nothing(name: str, arguments: Any, said: str):
    state = ToolCalcDb().seed(row([SHIP], ""))
    assert ToolCalcDb().call(state, name, arguments).startswith("error: ")
    assert said in ToolCalcDb().call(state, name, arguments)
    assert state == TABLES


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ground_truth": []}, "ground_truth is empty and expected_answer absent"),
        ({"ground_truth": [{"name": "x"}]}, "give name and arguments"),
        ({"ground_truth": [{"name": "drop", "arguments": {}}]}, "there is no tool drop"),
        ({"ground_truth": [], "expected_answer": "many"}, "expected_answer = 'many'"),
        ({"tables": []}, "tables is not an object"),
        ({"tables": {"email": [{"id": 1}]}}, "tables.email contains"),
        ({"tables": {"calendar": [TABLES["calendar"][0]] * 2}}, "has an id twice"),
    ],
)
def test_a_row_that_cannot_be_judged_is_refused(changes: dict[str, Any], said: str):
    with pytest.raises(BadRow, match=said):
        ToolCalcDb().check({**row([CANCEL], ""), **changes})
