import copy
import json
import re
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron.data.chat.render import Rendered, render, training_sequences
from nemotron.data.chat.template import TEMPLATE, fill, load_template
from nemotron.data.corpus import EMBEDDED
from tests.support.conversations import (
    ANSWER,
    CALL_TEXT,
    CALLING,
    GARDEN,
    GARDEN_TOOLS,
    QUESTION,
    RESULT,
    THOUGHT,
    TOOLS,
    call,
)

GOLDEN = Path(__file__).parent / "golden" / "three_turns.txt"
SYSTEM = "<|im_start|>system\n<|im_end|>\n"
USER = "<|im_start|>user\nQ<|im_end|>\n"
ASSISTANT = "<|im_start|>assistant\n"
MODES: list[dict[str, Any]] = [
    {},
    {"enable_thinking": False},
    {"truncate_history_thinking": False},
    {"budget": 64},
    {"effort": "low"},
    {"effort": "efficient"},
]


def text(*messages: dict[str, Any], **options: Any) -> str:
    return render(messages, **options).text


def supervised(rendered: Rendered) -> list[str]:
    return [rendered.text[start:stop] for start, stop in rendered.supervised]


def marked(rendered: Rendered) -> str:
    """Write the text with its spans in the brackets of the golden file."""
    pieces, position = [], 0
    for start, stop in rendered.supervised:
        pieces += [rendered.text[position:start], "⟦", rendered.text[start:stop], "⟧"]
        position = stop
    return "".join([*pieces, rendered.text[position:]])


def without_reasoning(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages]


# the format, row by row


def test_a_turn_stands_between_its_markers():
    assert text(QUESTION) == SYSTEM + USER


def test_the_system_turn_is_there_even_when_no_message_gives_it():
    empty = {"role": "system", "content": ""}
    assert text(QUESTION) == text(empty, QUESTION) == SYSTEM + USER
    given = {"role": "system", "content": " S\n"}
    assert text(given, QUESTION) == "<|im_start|>system\n S\n<|im_end|>\n" + USER


def test_tools_stand_in_the_system_turn_after_a_blank_line_if_text_precedes():
    with_text = text({"role": "system", "content": "S"}, QUESTION, tools=TOOLS)
    assert with_text.startswith("<|im_start|>system\nS\n\n# Tools\n\n")
    alone = text(QUESTION, tools=TOOLS)
    assert alone.startswith("<|im_start|>system\n# Tools\n\n")
    assert with_text.replace("S\n\n", "", 1) == alone
    assert alone.endswith("</IMPORTANT><|im_end|>\n" + USER)
    assert "\n\n<IMPORTANT>\n" in alone
    assert text(QUESTION, tools=[]) == text(QUESTION)


def test_a_tool_is_written_with_all_that_its_schema_says():
    tool = {
        "type": "function",
        "function": {
            "name": "add",
            "description": " Adds <two> numbers.\n",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "description": "first", "minimum": 0},
                    "b": {"type": ["integer", "null"], "enum": [1, "zwölf"], "x": {"y": [1]}},
                    "items": {},
                },
                "required": ["a", "b"],
                "additionalProperties": False,
            },
        },
    }
    expected = """<tools>
<function>
<name>add</name>
<description>Adds <two> numbers.</description>
<parameters>
<parameter>
<name>a</name>
<type>integer</type>
<description>first</description>
<minimum>0</minimum>
</parameter>
<parameter>
<name>b</name>
<type>["integer", "null"]</type>
<enum>[1, "zwölf"]</enum>
<x>{"y": [1]}</x>
</parameter>
<parameter>
<name>items</name>
</parameter>
<additionalProperties>False</additionalProperties>
<required>["a", "b"]</required>
</parameters>
<strict>True</strict>
</function>
<function>
<name>f</name>
<parameters>
</parameters>
</function>
</tools>

"""
    assert expected in text(QUESTION, tools=[tool, *TOOLS])
    assert text(QUESTION, tools=[tool["function"]]) == text(QUESTION, tools=[tool])


def test_reasoning_stands_before_the_answer():
    expected = SYSTEM + USER + ASSISTANT + "<think>\nR\n</think>\nA<|im_end|>\n"
    assert text(QUESTION, THOUGHT) == expected


def test_without_reasoning_the_tags_are_empty():
    expected = SYSTEM + USER + ASSISTANT + "<think></think>A<|im_end|>\n"
    assert text(QUESTION, ANSWER) == expected
    for nothing in (None, "", " \n"):
        assert text(QUESTION, {**ANSWER, "reasoning_content": nothing}) == expected


@pytest.mark.parametrize(
    ("content", "span"),
    [
        ("<think>\nR\n</think>\nA", "R\n</think>\nA<|im_end|>\n"),
        ("<think>R</think>A", "R</think>A<|im_end|>\n"),
        ("<think></think>A", "A<|im_end|>\n"),
        ("R</think>A", "R</think>A<|im_end|>\n"),
    ],
)
def test_tags_inside_the_content_are_kept_and_get_no_others(content: str, span: str):
    rendered = render([QUESTION, {"role": "assistant", "content": content}])
    assert rendered.text == SYSTEM + USER + ASSISTANT + content + "<|im_end|>\n"
    assert supervised(rendered) == [span]


def test_a_call_is_written_with_its_parameters():
    arguments = {"s": "a\nb", "i": 1, "x": 2.5, "t": True, "n": None, "l": [1, "é"], "m": {"k": ""}}
    values = ["a\nb", "1", "2.5", "True", "None", '[1, "é"]', '{"k": ""}']
    expected = "<tool_call>\n<function=g>\n"
    for key, value in zip(arguments, values, strict=True):
        expected += f"<parameter={key}>\n{value}\n</parameter>\n"
    expected += "</function>\n</tool_call>\n"
    start = SYSTEM + USER + ASSISTANT
    silent = {**CALLING, "tool_calls": [call(arguments, "g")]}
    assert text(QUESTION, silent) == f"{start}<think></think>\n{expected}<|im_end|>\n"
    spoken = {**silent, "content": "So."}
    assert text(QUESTION, spoken) == f"{start}<think></think>So.\n{expected}<|im_end|>\n"
    thought = {**spoken, "reasoning_content": "R"}
    expected = f"{start}<think>\nR\n</think>\nSo.\n{expected}<|im_end|>\n"
    assert text(QUESTION, thought) == expected


def test_arguments_are_the_same_as_an_object_and_as_its_text():
    arguments = {"k": {"ü": [1, 2]}, "j": "<b>"}
    as_text = {**CALLING, "tool_calls": [call(json.dumps(arguments))]}
    bare = {**CALLING, "tool_calls": [call(arguments)["function"]]}
    whole = text(QUESTION, {**CALLING, "tool_calls": [call(arguments)]})
    assert text(QUESTION, as_text) == text(QUESTION, bare) == whole
    assert '{"ü": [1, 2]}' in whole


def test_results_that_follow_each_other_share_a_turn():
    result = "<tool_response>\nT\n</tool_response>\n"
    one = "<|im_start|>user\n" + result + "<|im_end|>\n"
    two = "<|im_start|>user\n" + result + result + "<|im_end|>\n"
    start = text(QUESTION, CALLING)
    assert text(QUESTION, CALLING, RESULT) == start + one
    assert text(QUESTION, CALLING, RESULT, RESULT) == start + two
    call_turn = start.removeprefix(SYSTEM + USER)
    assert text(QUESTION, CALLING, RESULT, CALLING, RESULT, RESULT) == (
        start + one + call_turn + two
    )


def test_the_generation_prompt_opens_the_thought_or_closes_it():
    assert text(QUESTION, add_generation_prompt=True) == SYSTEM + USER + ASSISTANT + "<think>\n"
    off = text(QUESTION, add_generation_prompt=True, enable_thinking=False)
    assert off == SYSTEM + USER + ASSISTANT + "<think></think>"


def test_without_thinking_no_reasoning_is_left():
    inline = {"role": "assistant", "content": "<think>\nR\n</think>\nA"}
    plain = text(QUESTION, ANSWER, QUESTION, ANSWER)
    for message in (THOUGHT, inline):
        assert text(QUESTION, message, QUESTION, message, enable_thinking=False) == plain
    assert text(*GARDEN, tools=GARDEN_TOOLS, enable_thinking=False) == text(
        *without_reasoning(GARDEN), tools=GARDEN_TOOLS
    )


def test_reasoning_from_before_the_last_user_message_is_cut():
    kept = ASSISTANT + "<think>\nR\n</think>\nA<|im_end|>\n"
    # what follows the last </think> stays, its line break included
    cut = ASSISTANT + "<think></think>\nA<|im_end|>\n"
    assert text(QUESTION, THOUGHT, QUESTION, THOUGHT) == SYSTEM + USER + cut + USER + kept
    both = text(QUESTION, THOUGHT, QUESTION, THOUGHT, truncate_history_thinking=False)
    assert both == SYSTEM + USER + kept + USER + kept
    twice = {"role": "assistant", "content": "<think>R</think>B</think>A"}
    assert text(QUESTION, twice, QUESTION) == SYSTEM + USER + (
        ASSISTANT + "<think></think>A<|im_end|>\n" + USER
    )
    unfinished = {"role": "assistant", "content": "<think>R"}
    assert text(QUESTION, unfinished, QUESTION) == SYSTEM + USER + (
        ASSISTANT + "<think></think><|im_end|>\n" + USER
    )


def test_reasoning_in_the_tool_loop_of_the_current_turn_is_kept():
    thinking = {**CALLING, "reasoning_content": "R"}
    loop = text(QUESTION, thinking, RESULT, THOUGHT)
    assert loop.count("<think>\nR\n</think>\n") == 2
    history = text(QUESTION, thinking, RESULT, THOUGHT, QUESTION)
    assert "R" not in history
    assert ASSISTANT + "<think></think>\n" + CALL_TEXT + "<|im_end|>\n" in history


@pytest.mark.parametrize(
    ("options", "suffix"),
    [
        ({"budget": 256}, "\n\n{thinking token budget: 256}"),
        ({"budget": 0}, "\n\n{thinking token budget: 0}"),
        ({"effort": "low"}, "\n\n{reasoning effort: low}"),
        ({"effort": "efficient"}, "\n\n{reasoning effort: efficient}"),
    ],
)
def test_budget_and_effort_end_the_last_user_message(options: dict[str, Any], suffix: str):
    messages = [QUESTION, ANSWER, QUESTION, CALLING, RESULT, ANSWER]
    plain = text(*messages, tools=TOOLS)
    start = plain.rindex(USER)
    expected = plain[:start] + plain[start:].replace("Q", "Q" + suffix, 1)
    assert text(*messages, tools=TOOLS, **options) == expected


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "Q"}, {"type": "text", "text": "\nQ"}]
    for role in ("user", "system"):
        joined = {"role": role, "content": "Q\nQ"}
        assert text({"role": role, "content": parts}) == text(joined)


def test_space_at_the_end_of_an_answer_is_dropped():
    messy = {"role": "assistant", "content": " A \n\n"}
    assert text(QUESTION, messy).endswith("<think></think> A<|im_end|>\n")


def test_options_are_read_by_name_and_from_the_kwargs_of_the_template():
    template = load_template(TEMPLATE)
    options = {
        "enable_thinking": False,
        "truncate_history_thinking": False,
        "reasoning_budget": 7,
        "low_effort": True,
        "medium_effort": True,
    }
    values = {"messages": [QUESTION, THOUGHT, QUESTION, THOUGHT], "add_generation_prompt": True}
    plain = fill(template, **values)
    assert fill(template, **values, chat_template_kwargs=None) == plain
    for name, value in options.items():
        by_name = fill(template, **values, **{name: value})
        assert by_name != plain
        assert fill(template, **values, chat_template_kwargs={name: value}) == by_name


def test_rendering_changes_no_message():
    before = copy.deepcopy(GARDEN)
    render(GARDEN, GARDEN_TOOLS)
    assert before == GARDEN


# the spans


def test_a_conversation_of_three_turns_is_as_in_the_golden_file():
    rendered = render(GARDEN, GARDEN_TOOLS)
    assert marked(rendered) + "\n" == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_the_prompt_and_what_is_supervised_make_the_text(mode: dict[str, Any]):
    conversations = [
        (GARDEN, GARDEN_TOOLS),
        (GARDEN[:8], GARDEN_TOOLS),
        (GARDEN[:10], GARDEN_TOOLS),
        ([QUESTION, THOUGHT], None),
        ([QUESTION, THOUGHT, QUESTION, ANSWER], None),
    ]
    for messages, tools in conversations:
        whole = render(messages, tools, **mode)
        assert len(whole.supervised) == sum(m["role"] == "assistant" for m in messages)
        # a turn without reasoning answers the prompt that asks for none
        thinks = mode.get("enable_thinking", True) and "reasoning_content" in messages[-1]
        prefix = render(messages[:-1], tools, **mode).text
        opening = render(
            [QUESTION], enable_thinking=thinks, add_generation_prompt=True
        ).text.removeprefix(SYSTEM + USER)
        assert whole.text == prefix + opening + supervised(whole)[-1]
        if thinks:
            prompt = render(messages[:-1], tools, add_generation_prompt=True, **mode)
            assert prompt.text == prefix + opening
            assert prompt.supervised == whole.supervised[:-1]


TEXT = st.text(alphabet=st.characters(codec="utf-8") | st.sampled_from("\n é🙂<>{}%#⟦")).filter(
    lambda text: "<|im_" not in text and "think>" not in text
)


@pytest.mark.slow
@given(TEXT, TEXT, TEXT, TEXT, TEXT)
def test_no_text_moves_a_span(system: str, user: str, reasoning: str, answer: str, value: str):
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": user},
        {"role": "assistant", "reasoning_content": "R" + reasoning, "content": answer},
        {"role": "user", "content": value},
        {"role": "assistant", "content": answer, "tool_calls": [call({"k": value})]},
        {"role": "tool", "content": value},
        {"role": "assistant", "reasoning_content": "R" + reasoning, "content": answer},
    ]
    rendered = render(messages, TOOLS)
    opening = "R" + reasoning + "\n</think>\n"
    assert supervised(rendered) == [
        ("\n" + answer).rstrip() + "<|im_end|>\n",
        answer.rstrip() + "\n" + CALL_TEXT.replace("1", value) + "<|im_end|>\n",
        (opening + answer).rstrip() + "<|im_end|>\n",
    ]
    start, stop = rendered.supervised[-1]
    assert rendered.text[:start] == text(*messages[:-1], tools=TOOLS, add_generation_prompt=True)
    assert stop == len(rendered.text)


def test_spans_are_right_inside_loops_and_conditions():
    source = (
        "é{% for x in xs %}{% if x %}<{% generation %}{% for y in x %}[{{ y }}]{% endfor %}"
        "{% endgeneration %}>{% else %}🙂{% endif %}{% endfor %}"
    )
    result = fill(load_template(source), xs=["äb", "", "🙂"])
    assert result == ("é<[ä][b]>🙂<[🙂]>", ((2, 8), (11, 14)))


def test_a_block_that_is_not_written_where_it_is_marked_is_no_silent_error():
    source = "a{% set kept %}{% generation %}b{% endgeneration %}{% endset %}c{{ kept }}"
    with pytest.raises(AssertionError, match="at character 1: 'b'"):
        fill(load_template(source))


def test_the_template_refuses_a_role_that_it_does_not_know():
    with pytest.raises(jinja2.TemplateError, match="the role developer; give system"):
        render([{"role": "developer", "content": "D"}, QUESTION])


# what is trained on


def test_a_conversation_without_reasoning_is_one_sequence():
    messages = without_reasoning(GARDEN)
    assert training_sequences(messages, GARDEN_TOOLS) == [render(messages, GARDEN_TOOLS)]
    assert len(render(messages, GARDEN_TOOLS).supervised) == 5


def test_a_conversation_with_reasoning_is_one_sequence_for_each_user_turn():
    first, second, third = training_sequences(GARDEN, GARDEN_TOOLS)
    assert first.text == render(GARDEN[:3], GARDEN_TOOLS).text
    assert supervised(first) == ["Good morning. 🌱<|im_end|>\n"]
    assert second.text == render(GARDEN[:8], GARDEN_TOOLS).text
    assert [span.partition("\n")[0] for span in supervised(second)] == [
        "Two places, two calls.",
        "Index 1 is the day after.",
    ]
    assert third.text == render(GARDEN, GARDEN_TOOLS).text
    assert [span.partition("\n")[0] for span in supervised(third)] == [
        "Rain comes in two days,",
        "Dry today.",
    ]


def test_every_reasoning_is_trained_on_exactly_once():
    spans = "".join("".join(supervised(s)) for s in training_sequences(GARDEN, GARDEN_TOOLS))
    for message in GARDEN:
        assert spans.count(message.get("reasoning_content", "Only in Köln, the day")) == 1


def test_reasoning_inside_the_content_splits_a_conversation_too():
    inline = {"role": "assistant", "content": "<think>\nR\n</think>\nA"}
    assert len(training_sequences([QUESTION, inline, QUESTION, ANSWER])) == 2
    empty = {"role": "assistant", "content": "<think></think>A"}
    assert len(training_sequences([QUESTION, empty, QUESTION, ANSWER])) == 1


def test_without_thinking_a_conversation_is_one_sequence():
    (sequence,) = training_sequences(GARDEN, GARDEN_TOOLS, enable_thinking=False)
    assert sequence == render(without_reasoning(GARDEN), GARDEN_TOOLS)


def test_a_user_message_without_answer_makes_no_sequence():
    ends = [QUESTION, QUESTION, THOUGHT, QUESTION]
    assert training_sequences(ends) == [render(ends[:3])]
    assert training_sequences([QUESTION, ANSWER, QUESTION]) == [render([QUESTION, ANSWER])]
    assert training_sequences([THOUGHT]) == [render([THOUGHT])]


def test_a_result_that_nothing_follows_is_left_out():
    thinking = {**CALLING, "reasoning_content": "R"}
    for calling in (thinking, CALLING):
        messages = [QUESTION, calling, RESULT]
        assert training_sequences(messages, TOOLS) == [render(messages[:2], TOOLS)]


@pytest.mark.parametrize("mode", MODES[3:], ids=str)
def test_budget_and_effort_stand_in_every_sequence(mode: dict[str, Any]):
    for sequence in training_sequences(GARDEN, GARDEN_TOOLS, **mode):
        (start, _), *_ = sequence.supervised
        suffixes = re.findall(r"\n\n\{(?:thinking|reasoning) [^}]+\}<", sequence.text)
        assert len(suffixes) == 1
        assert suffixes[0] in sequence.text[:start]


# Hugging Face's reading of the same template


@pytest.fixture(scope="module")
def theirs() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(EMBEDDED / "tokenizer.json"), chat_template=TEMPLATE
    )


def parsed(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give the arguments as objects, which is how servers hand them to a template."""
    messages = copy.deepcopy(messages)
    for message in messages:
        for each in message.get("tool_calls", []):
            arguments = each["function"]["arguments"]
            if isinstance(arguments, str):
                each["function"]["arguments"] = json.loads(arguments)
    return messages


HF_OPTIONS = [
    {},
    {"enable_thinking": False},
    {"truncate_history_thinking": False},
    {"reasoning_budget": 64},
    {"low_effort": True},
    {"medium_effort": True},
]


@pytest.mark.parametrize(("mode", "options"), list(zip(MODES, HF_OPTIONS, strict=True)), ids=str)
def test_transformers_renders_the_same_text(
    theirs: Any, mode: dict[str, Any], options: dict[str, Any]
):
    parts = [{"type": "text", "text": "Q"}, {"type": "text", "text": "ü"}]
    for messages, tools in [
        (GARDEN, GARDEN_TOOLS),
        ([QUESTION, THOUGHT, QUESTION, ANSWER], None),
        ([{"role": "user", "content": parts}], None),
    ]:
        for prompt in (False, True):
            ours = render(messages, tools, add_generation_prompt=prompt, **mode).text
            call_theirs = theirs.apply_chat_template
            settings = {"tools": tools, "tokenize": False, "add_generation_prompt": prompt}
            assert call_theirs(parsed(messages), **settings, **options) == ours
            assert call_theirs(parsed(messages), **settings, chat_template_kwargs=options) == ours


@pytest.mark.parametrize(("mode", "options"), list(zip(MODES, HF_OPTIONS, strict=True)), ids=str)
def test_transformers_masks_the_same_tokens(
    theirs: Any, mode: dict[str, Any], options: dict[str, Any]
):
    rendered = render(GARDEN, GARDEN_TOOLS, **mode)
    encoded = theirs.apply_chat_template(
        parsed(GARDEN),
        tools=GARDEN_TOOLS,
        return_assistant_tokens_mask=True,
        return_dict=True,
        tokenize=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
        **options,
    )
    ours = [
        int(any(start <= first and last <= stop for start, stop in rendered.supervised))
        for first, last in encoded["offset_mapping"]
    ]
    assert encoded["assistant_masks"] == ours
    assert 0 < sum(ours) < len(ours)


# what is refused
