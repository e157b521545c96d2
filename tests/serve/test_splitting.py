"""Answers in the chat format taken apart, however they arrive."""

import json
import random

import pytest

from nemotron.data.chat.calls import read_calls
from nemotron.data.chat.render import render
from nemotron.serve.split import Delta, Splitter
from tests.support.serving import ARGUMENTS, TOOLS


def split(parts: list[str], *, thinks: bool = True, tools: list = TOOLS) -> Delta:
    splitter = Splitter(tools, thinks=thinks)
    deltas = [*map(splitter.push, parts), splitter.close()]
    return Delta(
        "".join(delta.reasoning for delta in deltas),
        "".join(delta.content for delta in deltas),
        tuple(call for delta in deltas for call in delta.calls),
    )


def written(message: dict) -> str:
    """Return what the model writes of a message, as the chat template has it."""
    rendered = render([{"role": "user", "content": "?"}, message], TOOLS)
    [(start, stop)] = rendered.supervised
    return rendered.text[start:stop].removesuffix("<|im_end|>\n")


MESSAGE = {
    "role": "assistant",
    "reasoning_content": "Let me see:\n\na < b, </thin",
    "content": "I look.\n\n<tool_ca is no mark.",
    "tool_calls": [
        {"function": {"name": "find", "arguments": ARGUMENTS}},
        {"function": {"name": "find", "arguments": {"days": 4}}},
    ],
}


def test_what_the_template_writes_is_read_back_at_every_cut():
    text = written(MESSAGE)
    rng = random.Random(1)
    for _ in range(60):
        cuts = sorted(rng.sample(range(len(text)), rng.randrange(1, 30)))
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        found = split(parts)
        assert found.reasoning == MESSAGE["reasoning_content"]
        assert found.content == MESSAGE["content"]
        assert [call.arguments for call in found.calls] == [ARGUMENTS, {"days": 4}]
    assert split(list(text)) == split([text])


def test_reasoning_that_is_never_closed_is_no_content():
    assert split(["still ", "thinking </thi"]) == Delta("still thinking </thi", "")


def test_without_reasoning_all_is_content():
    assert split(["\nYes", " </think>\n"], thinks=False) == Delta("", "Yes </think>\n")


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\n<function=find>\n<parameter=city>\nRome",
        "<tool_call>\n<function=other>\n</function>\n</tool_call>",
        "<tool_call>{}</tool_call>",
    ],
)
def test_what_is_no_call_stays_text(text: str):
    assert split(["Hm. ", text], thinks=False) == Delta("", "Hm. " + text)


def test_a_value_that_does_not_fit_its_schema_stays_text():
    parameter = "<parameter=days>\n{}\n</parameter>"
    block = f"<tool_call>\n<function=find>\n{parameter}\n</function>\n</tool_call>"
    for text in ("many", "NaN", "[" * 100_000):
        _, [call] = read_calls(block.format(text), TOOLS)
        assert call.arguments == {"days": text}
    _, [call] = read_calls(block.format("-7"), TOOLS)
    assert json.dumps(call.arguments) == '{"days": -7}'
