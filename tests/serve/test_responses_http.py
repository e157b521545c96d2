"""The Responses interface, by the official client and its types."""

import json
from typing import Any, Literal

import pytest
from pydantic import BaseModel, TypeAdapter

from tests.support.serving import ARGUMENTS, TOOLS, Running, Start

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
types = pytest.importorskip("openai.types.responses")

Json = dict[str, Any]
HELLO = [{"role": "user", "content": "Hello"}]
OWN_TOOLS: Any = [{"type": "function", "strict": False, **TOOLS[0]["function"]}]
CALL = (
    "Which?\n</think>\nI look.\n<tool_call>\n<function=find>\n<parameter=city>\n12\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n<|im_end|>"
)


@pytest.fixture(scope="module")
def client(running: Running):
    with openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def dictated(running: Running):
    """Sets what the model answers."""
    yield running.answers.append
    running.answers.clear()


def post(running: Running, **body: Any) -> httpx.Response:
    body = {"model": "tiny", "input": "Hello", "max_output_tokens": 12} | body
    return httpx.post(running.url + "/v1/responses", json=body, timeout=60)


def events(response: httpx.Response) -> list[Json]:
    found = []
    for block in response.text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


def test_a_response_has_the_parts_of_the_same_chat(client, dictated):
    dictated(CALL)
    found = client.responses.create(model="tiny", input="Hello", tools=OWN_TOOLS)
    chat = client.chat.completions.create(model="tiny", messages=HELLO, tools=TOOLS)
    reasoning, message, call = found.output
    own = chat.choices[0].message
    assert reasoning.content[0].text == own.reasoning_content == "Which?"
    assert found.output_text == own.content == "I look."
    assert (message.role, message.status) == ("assistant", "completed")
    assert (call.type, call.name) == ("function_call", "find")
    assert call.arguments == own.tool_calls[0].function.arguments
    assert json.loads(call.arguments)["city"] == ARGUMENTS["city"]
    assert (found.status, found.error) == ("completed", None)
    assert found.usage.input_tokens == chat.usage.prompt_tokens
    assert found.usage.output_tokens == chat.usage.completion_tokens
    details = chat.usage.completion_tokens_details
    assert found.usage.output_tokens_details.reasoning_tokens == details.reasoning_tokens > 0


def test_its_items_and_the_result_of_a_call_go_back_as_a_conversation(client, dictated):
    dictated(CALL)
    given: Json = {"model": "tiny", "tools": OWN_TOOLS, "instructions": "Be short."}
    given |= {"store": False, "include": ["reasoning.encrypted_content"]}
    first = client.responses.create(**given, input="Hello")
    call = first.output[-1]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "0"}
    items = [{"role": "user", "content": "Hello"}, *first.output, result]
    second = client.responses.create(**given, input=items)
    chat = client.chat.completions.create(model="tiny", messages=HELLO, tools=TOOLS)
    history = [
        {"role": "system", "content": "Be short."},
        *HELLO,
        chat.choices[0].message,
        {"role": "tool", "tool_call_id": "1", "content": "0"},
    ]
    same = client.chat.completions.create(model="tiny", messages=history, tools=TOOLS)
    assert second.usage.input_tokens == same.usage.prompt_tokens > first.usage.input_tokens


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        ([{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}], HELLO),
        (
            [{"role": "developer", "content": "Be glad."}, *HELLO],
            [{"role": "system", "content": "Be short.\n\nBe glad."}, *HELLO],
        ),
        (
            [*HELLO, {"type": "message", "role": "assistant", "content": "Hi."}, *HELLO],
            [*HELLO, {"role": "assistant", "content": "Hi."}, *HELLO],
        ),
    ],
)
def test_items_are_messages(running: Running, items: list[Json], messages: list[Json]):
    given: Json = {} if messages[0]["role"] == "user" else {"instructions": "Be short."}
    found = post(running, input=items, temperature=0, **given).json()
    asked = {"model": "tiny", "messages": messages, "max_tokens": 12, "temperature": 0}
    chat = httpx.post(running.url + "/v1/chat/completions", json=asked, timeout=60).json()
    assert found["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    [item] = found["output"]
    assert item["content"][0]["text"] == chat["choices"][0]["message"]["reasoning_content"]


def test_a_stream_builds_the_whole_response(client, dictated):
    dictated(CALL)
    with client.responses.stream(model="tiny", input="Hello", tools=OWN_TOOLS) as stream:
        seen = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert [event.type.removeprefix("response.") for event in seen[:2]] == [
        "created",
        "in_progress",
    ]
    assert seen[-1].type == "response.completed"

    def joined(kind: str) -> str:
        return "".join(event.delta for event in seen if event.type == f"response.{kind}.delta")

    assert joined("reasoning_text") == "Which?"
    assert joined("output_text") == "I look." == final.output_text
    assert sum(event.type == "response.output_text.delta" for event in seen) > 1
    assert json.loads(joined("function_call_arguments"))["days"] == 3
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    # what the client put together from the events is what the last one says
    done = [event.item for event in seen if event.type == "response.output_item.done"]
    assert [item.id for item in done] == [item.id for item in final.output]


@pytest.mark.parametrize("tools", [None, OWN_TOOLS])
def test_all_is_of_the_types_of_the_client(running: Running, dictated, tools: Any):
    dictated(CALL)
    whole = post(running, tools=tools).json()
    types.Response.model_validate(whole)
    found = events(post(running, tools=tools, stream=True))
    of_event = TypeAdapter(types.ResponseStreamEvent)
    for event in found:
        assert of_event.validate_python(event).type == event["type"]
    last = found[-1]["response"]

    def without_names(value: Any) -> Any:
        """Return it without what differs from answer to answer."""
        if isinstance(value, dict):
            left = {k: v for k, v in value.items() if k not in ("id", "call_id", "created_at")}
            return {key: without_names(inner) for key, inner in left.items()}
        return [without_names(inner) for inner in value] if isinstance(value, list) else value

    assert without_names(last) == without_names(whole)


def test_an_answer_that_is_cut_is_incomplete(running: Running):
    found = post(running, max_output_tokens=5).json()
    types.Response.model_validate(found)
    assert found["status"] == "incomplete"
    assert found["incomplete_details"] == {"reason": "max_output_tokens"}
    assert found["usage"]["output_tokens"] == 5
    assert found["output"][-1]["status"] == "incomplete"
    last = events(post(running, max_output_tokens=5, stream=True))[-1]
    assert last["type"] == "response.incomplete"


def test_an_empty_answer_is_a_message(client, dictated):
    dictated("</think><|im_end|>")
    found = client.responses.create(model="tiny", input="Hello")
    assert [item.type for item in found.output] == ["message"]
    assert found.output_text == ""


class Place(BaseModel):
    """What an answer of the client's own type holds."""

    days: Literal[3]


def test_an_answer_may_have_a_form(client):
    pytest.importorskip("llguidance")
    found = client.responses.parse(
        model="tiny",
        input="Hello",
        text_format=Place,
        reasoning={"effort": "none"},
        temperature=0,
        max_output_tokens=400,
    )
    assert found.status == "completed"
    assert found.output_parsed == Place(days=3)


def test_a_server_that_ends_says_that_the_response_failed(start: Start):
    ending = start()
    body = {"model": "tiny", "input": "Hello", "max_output_tokens": 1900, "stream": True}
    with httpx.stream("POST", ending.url + "/v1/responses", json=body, timeout=60) as response:
        parts = response.iter_text()
        first = next(parts)
        ending.worker.end_within(0)
        text = first + "".join(parts)
    last = json.loads(text.strip().split("\n\n")[-1].split("data: ")[1])
    failed = types.ResponseFailedEvent.model_validate(last)
    assert failed.response.status == "failed"
    assert "shutting down" in failed.response.error.message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input": []}, "input = [] is wrong"),
        ({"input": 3}, "input = 3 is wrong"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0].type = 'item_reference'"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0] is not a part of text",
        ),
        ({"input": [{"role": "user"}]}, "input[0].content is neither"),
        ({"input": [{"role": "me", "content": "a"}]}, "role is 'me'"),
        (
            {"input": [{"type": "function_call_output", "call_id": "a", "output": "0"}]},
            "no assistant message with tool_calls comes before it",
        ),
        ({"include": ["file_search_call.results"]}, "include[0] = file_search_call.results"),
        ({"store": True}, "store = true is wrong: input should be false"),
        ({"previous_response_id": "resp_1"}, "resp_1 is wrong: no response is stored here; send"),
        ({"tools": [{"type": "web_search"}]}, "tools[0] does not name a function"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"temperature": 1e-9}, "at least 0.001"),
        ({"max_output_tokens": -1}, "max_output_tokens = -1 is wrong"),
        ({"max_tokens": 5}, "max_tokens is not a known field; did you mean max_output_tokens?"),
        ({"text": {"format": {"type": "json_schema"}}}, "schema must be given"),
        ({"instructions": "<|im_end|>"}, "bounds of a turn"),
    ],
)
def test_what_is_impossible_gets_a_sentence(running: Running, changes: Json, words: str):
    response = post(running, **changes)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


def test_a_client_that_leaves_frees_its_place(running: Running):
    body = {"model": "tiny", "input": "Hello", "max_output_tokens": 1900, "stream": True}
    with httpx.stream("POST", running.url + "/v1/responses", json=body, timeout=60) as response:
        next(response.iter_text())
    running.wait_until_empty()
