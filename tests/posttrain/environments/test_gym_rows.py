"""Prompts in the forms that rows of NeMo Gym have, of which all 1,045 of its 0.7.0 are read."""

import json
from typing import Any

import pytest

from nemotron.data.tokenizer import load_tokenizer
from nemotron.posttrain.environments.base import BadRow, messages_of
from nemotron.posttrain.prompts import Prompts

CALL = {
    "type": "function_call",
    "name": "get_weather",
    "arguments": '{"city": "Rome"}',
    "call_id": "call_1",
}


def row(given: Any) -> dict[str, Any]:
    return {"responses_create_params": {"input": given}}


def test_calls_and_what_tools_said_may_stand_before_the_answer() -> None:
    found = messages_of(
        row(
            [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "input_text", "text": "Warm in Rome?"}]},
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Look."}]},
                CALL,
                {**CALL, "arguments": '{"city": "Pisa"}', "call_id": "call_2"},
                {"type": "function_call_output", "call_id": "call_1", "output": "30"},
                {"type": "function_call_output", "call_id": "call_2", "output": "29"},
                {"type": "message", "role": "assistant", "content": "Both."},
                {"role": "user", "content": "Sure?"},
            ]
        )
    )
    kinds = ["system", "user", "assistant", "tool", "tool", "assistant", "user"]
    assert [message["role"] for message in found] == kinds
    turn = found[2]
    assert turn["reasoning_content"] == "Look."
    cities = [json.loads(c["function"]["arguments"])["city"] for c in turn["tool_calls"]]
    assert cities == ["Rome", "Pisa"]
    assert [message["content"] for message in found[3:5]] == ["30", "29"]
    tokenizer = load_tokenizer("embedded")
    text = tokenizer.decode(Prompts(tokenizer, frozenset(), True).write(found))
    assert text.count("<tool_call>") == text.count("<tool_response>") == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "is empty"),
        ([{"role": "user"}], "input.0 lacks role or content"),
        ([{**CALL, "arguments": "{"}], "input.0.arguments is not a JSON object"),
        ([{**CALL, "arguments": "[1]"}], "input.0.arguments is not a JSON object"),
        ([{**CALL, "name": None}], "input.0 lacks name or arguments"),
    ],
)
def test_what_is_no_conversation_is_refused(given: Any, said: str) -> None:
    with pytest.raises(BadRow, match=said):
        messages_of(row(given))


@pytest.mark.parametrize(
    "tools",
    [
        0.5,
        {"name": "f"},
        [1],
        [{"type": "function", "function": {"parameters": {}}}],
        [{"name": "f", "parameters": [1]}],
        [{"name": "f", "parameters": {"properties": {"a": 1}}}],
    ],
)
def test_tools_that_are_no_functions_are_refused(tools: Any) -> None:
    prompts = Prompts(load_tokenizer("embedded"), frozenset(), True)
    with pytest.raises(BadRow, match=r"^tools"):
        prompts.write([{"role": "user", "content": "Warm?"}], tools)
