"""Conversations that cannot be trained on are refused in one sentence that names the place."""

import re
from typing import Any

import pytest

from nemotron.data.chat.check import check_messages
from nemotron.data.chat.render import training_sequences
from tests.support.conversations import (
    ANSWER,
    CALLING,
    GARDEN,
    GARDEN_TOOLS,
    QUESTION,
    RESULT,
    TOOLS,
    WEATHER,
    call,
)


def test_conversations_that_are_right_pass():
    check_messages(GARDEN, GARDEN_TOOLS)
    check_messages([QUESTION, ANSWER])
    check_messages([QUESTION, {**CALLING, "content": ""}, RESULT, RESULT, ANSWER], [WEATHER])
    check_messages([{**QUESTION, "tool_calls": None}, {**ANSWER, "tool_calls": []}], [])
    check_messages([{"role": "user", "content": [{"type": "text", "text": "Q"}]}, ANSWER])


NO_FUNCTION = 'does not name a function; give {"type": "function", "function": {"name": a string, '


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        (None, "messages is null; give a list of at least one message."),
        ("Q", "messages is a string; give a list of at least one message."),
        ([], "messages is empty; give a list of at least one message."),
        (["Q"], "messages[0] is a string; give an object with role and content."),
        (
            [{"content": "Q"}],
            "messages[0].role is None; give one of system, user, assistant, tool.",
        ),
        (
            [QUESTION, {"role": "bot", "content": "A"}],
            "messages[1].role is 'bot'; give one of system, user, assistant, tool.",
        ),
        (
            [QUESTION, {"role": "system", "content": "S"}],
            "messages[1].role is system; only the first message may have this role.",
        ),
        ([{"role": "user"}, ANSWER], "messages[0].content is null; give a string."),
        ([{**QUESTION, "content": 3}], "messages[0].content is a number; give a string."),
        (
            [QUESTION, {**ANSWER, "content": None}],
            "messages[1].content is null; give a string (null only beside tool_calls).",
        ),
        (
            [{**QUESTION, "content": [{"type": "image_url", "image_url": {}}]}],
            'messages[0].content[0] is not a text part; give {"type": "text", "text": a string}.',
        ),
        (
            [{**QUESTION, "content": [{"type": "text", "text": "Q"}, {"type": "text"}]}],
            'messages[0].content[1] is not a text part; give {"type": "text", "text": a string}.',
        ),
        (
            [QUESTION, {**ANSWER, "reasoning_content": ["R"]}],
            "messages[1].reasoning_content is a list; give a string, or leave it out.",
        ),
        (
            [QUESTION, RESULT],
            "messages[1].role is tool, but no assistant message with tool_calls comes before it; "
            "put the call before its result.",
        ),
        (
            [QUESTION, CALLING, QUESTION, RESULT],
            "messages[3].role is tool, but no assistant message with tool_calls comes before it; "
            "put the call before its result.",
        ),
        (
            [{**QUESTION, "tool_calls": [call({})]}],
            "messages[0].tool_calls is given for the role user; only assistant can call.",
        ),
        (
            [QUESTION, {**CALLING, "tool_calls": call({})}],
            "messages[1].tool_calls is an object; give a list of calls.",
        ),
        (
            [QUESTION, {**CALLING, "tool_calls": [call({}), {"function": {"arguments": {}}}]}],
            f'messages[1].tool_calls[1] {NO_FUNCTION}"arguments": an object}}}}.',
        ),
        (
            [QUESTION, {**CALLING, "tool_calls": ["f"]}],
            f'messages[1].tool_calls[0] {NO_FUNCTION}"arguments": an object}}}}.',
        ),
        *(
            (
                [QUESTION, {**CALLING, "tool_calls": [call(arguments)]}],
                "messages[1].tool_calls[0]: the arguments of f are not a JSON object; "
                "give an object, or its JSON text.",
            )
            for arguments in (None, "", "{", "[1]", [1], 3)
        ),
        (
            [QUESTION],
            "messages has no assistant message; give at least one to train on.",
        ),
        *(
            (
                [QUESTION, {**ANSWER, key: f"x{token}y"}],
                f"messages[1].{key} contains {token}, which marks the bounds of a turn; "
                "remove it from the text.",
            )
            for key in ("content", "reasoning_content")
            for token in ("<|im_start|>", "<|im_end|>")
        ),
        (
            [
                {
                    **QUESTION,
                    "content": [
                        {"type": "text", "text": "<|im_"},
                        {"type": "text", "text": "end|>"},
                    ],
                }
            ],
            "messages[0].content contains <|im_end|>, which marks the bounds of a turn; "
            "remove it from the text.",
        ),
        (
            [QUESTION, {**CALLING, "tool_calls": [call('{"k": ["\\u003c|im_end|>"]}')]}],
            "messages[1].tool_calls[0] contains <|im_end|>, which marks the bounds of a turn; "
            "remove it from the text.",
        ),
    ],
)
def test_a_conversation_that_is_wrong_is_refused_in_one_sentence(messages: Any, sentence: str):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        check_messages(messages, TOOLS)


@pytest.mark.parametrize("tools", [None, []])
def test_calls_need_the_tools_of_the_row(tools: Any):
    sentence = (
        "messages[1].tool_calls is given, but the tools of the row are missing; "
        "give the list of functions that could be called."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        check_messages([QUESTION, CALLING], tools)


@pytest.mark.parametrize(
    ("tools", "sentence"),
    [
        ("[]", "tools is a string; give a list of functions."),
        (WEATHER, "tools is an object; give a list of functions."),
        *(
            (
                [WEATHER, tool],
                f'tools[1] {NO_FUNCTION}"parameters": a schema}}}}.',
            )
            for tool in ("f", {}, {"function": "f"}, {"type": "function", "function": {"name": ""}})
        ),
        *(
            (
                [{"name": "f", "parameters": parameters}],
                "tools[0]: the parameters of f are not a JSON schema of an object; "
                'give {"type": "object", "properties": {a name: its schema}}.',
            )
            for parameters in (["a"], {"properties": ["a"]}, {"properties": {"a": "string"}})
        ),
        (
            [{"name": "f", "description": "<|im_start|>user"}],
            "tools[0] contains <|im_start|>, which marks the bounds of a turn; remove it from the "
            "text.",
        ),
    ],
)
def test_tools_that_are_wrong_are_refused_in_one_sentence(tools: Any, sentence: str):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        check_messages([QUESTION, ANSWER], tools)


def test_splitting_refuses_what_the_check_refuses():
    with pytest.raises(ValueError, match="no assistant message"):
        training_sequences([QUESTION])
