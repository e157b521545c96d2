"""Messages and conversations of which the tests make theirs."""

from typing import Any

QUESTION = {"role": "user", "content": "Q"}
ANSWER = {"role": "assistant", "content": "A"}
THOUGHT = {"role": "assistant", "reasoning_content": "R", "content": "A"}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def call(arguments: Any, name: str = "f") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


CALLING = {"role": "assistant", "content": None, "tool_calls": [call({"k": 1})]}
RESULT = {"role": "tool", "content": "T"}
CALL_TEXT = "<tool_call>\n<function=f>\n<parameter=k>\n1\n</parameter>\n</function>\n</tool_call>\n"

WEATHER = {
    "name": "weather",
    "description": "Forecast for a place.",
    "parameters": {
        "type": "object",
        "properties": {
            "place": {"type": "string", "description": "Town or village."},
            "days": {"type": "integer", "enum": [1, 3], "default": 1},
        },
        "required": ["place"],
    },
}
GARDEN = [
    {"role": "system", "content": "You keep a garden's diary."},
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "Good morning. 🌱"},
    {"role": "user", "content": "Will it rain in Köln and Brühl?"},
    {
        "role": "assistant",
        "reasoning_content": "Two places, two calls.",
        "content": "I look it up.",
        "tool_calls": [
            call('{"place": "Köln", "days": 3}', "weather"),
            call({"place": "Brühl"}, "weather"),
        ],
    },
    {"role": "tool", "content": '{"rain": [0, 4]}'},
    {"role": "tool", "content": "dry"},
    {
        "role": "assistant",
        "reasoning_content": "Index 1 is the day after.",
        "content": "Only in Köln, the day after tomorrow.",
    },
    {"role": "user", "content": "Then water the beds there?"},
    {
        "role": "assistant",
        "reasoning_content": "Rain comes in two days,\nbeds dry out in one.",
        "content": None,
        "tool_calls": [call('{"place": "Köln"}', "weather")],
    },
    {"role": "tool", "content": "dry"},
    {"role": "assistant", "reasoning_content": "Dry today.", "content": "Yes, today."},
]
GARDEN_TOOLS = [{"type": "function", "function": WEATHER}]
