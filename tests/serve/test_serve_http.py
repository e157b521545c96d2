"""The server over HTTP: answers, streams, what is refused, and clients that leave."""

import dataclasses
import importlib
import json
import re
import subprocess
from typing import Any

import pytest

from nemotron.data.tokenizer import Tokenizer
from nemotron.generate.engine import Engine
from nemotron.generate.sampling import Sampling
from nemotron.model.hybrid import HybridLM
from tests.support.serving import ARGUMENTS, KEY, LIMITS, TOOLS, Running, Start

httpx = pytest.importorskip("httpx")
fuzz_server = importlib.import_module("tools.fuzz_server")

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
Json = dict[str, Any]


def complete(running: Running, **changes: Any) -> httpx.Response:
    body = {"model": "tiny", "prompt": "The first", "max_tokens": 12, "temperature": 0} | changes
    return httpx.post(running.url + "/v1/completions", json=body, timeout=60)


def chat(running: Running, **changes: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "seed": 1} | changes
    return httpx.post(running.url + CHAT, json=body, timeout=60)


def events(response: httpx.Response) -> list[Json]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def sentence(response: httpx.Response) -> str:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    message = error["message"]
    assert message.endswith((".", "?")), message
    assert "\n" not in message
    assert "Traceback" not in message
    return message


def expected(model: HybridLM, tokenizer: Tokenizer, prompt: str, count: int) -> str:
    new = Engine(model, {3}).generate([tokenizer.encode(prompt)], count, Sampling(0.0))[0]
    return tokenizer.decode(new, skip_specials=True)


def test_a_completion_is_what_the_engine_writes(
    running: Running, model: HybridLM, tokenizer: Tokenizer
):
    found = complete(running).json()
    assert found["choices"][0]["text"] == expected(model, tokenizer, "The first", 12)
    assert found["choices"][0]["finish_reason"] == "length"
    num_prompt = len(tokenizer.encode("The first"))
    assert found["usage"]["prompt_tokens"] == num_prompt
    assert found["usage"]["total_tokens"] == num_prompt + 12


def test_a_stream_is_the_same_text(running: Running):
    whole = complete(running).json()["choices"][0]["text"]
    chunks = events(complete(running, stream=True, stream_options={"include_usage": True}))
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == whole
    assert len(chunks) > 5
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["usage"]["completion_tokens"] == 12
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_several_prompts_and_samples_are_numbered(running: Running):
    prompts = ["The first", "A second"]
    alone = [complete(running, prompt=p).json()["choices"][0]["text"] for p in prompts]
    found = complete(running, prompt=prompts, n=2).json()["choices"]
    assert [choice["index"] for choice in found] == [0, 1, 2, 3]
    assert [choice["text"] for choice in found] == [alone[0]] * 2 + [alone[1]] * 2
    chunks = events(complete(running, prompt=prompts, n=2, stream=True))
    texts = [""] * 4
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == [choice["text"] for choice in found]


def test_a_prompt_may_be_tokens(running: Running, tokenizer: Tokenizer):
    text = complete(running).json()["choices"][0]["text"]
    for prompt in (tokenizer.encode("The first"), [tokenizer.encode("The first")]):
        assert complete(running, prompt=prompt).json()["choices"][0]["text"] == text


def test_a_seed_repeats_an_answer_and_samples_differ(running: Running):
    first, second, other = (
        complete(running, temperature=1, seed=seed, n=2).json()["choices"] for seed in (5, 5, 6)
    )
    assert first == second
    assert first[0]["text"] not in (first[1]["text"], other[0]["text"])


def test_a_stop_string_ends_the_answer(running: Running):
    text = complete(running).json()["choices"][0]["text"]
    stop = text[6:9]
    choice = complete(running, stop=stop).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == text[: text.index(stop)]


def test_log_probabilities_are_those_of_the_model(running: Running, tokenizer: Tokenizer):
    choice = complete(running, logprobs=0).json()["choices"][0]
    scores = choice["logprobs"]
    assert "".join(scores["tokens"]) == choice["text"]
    assert all(-12 < value < 0 for value in scores["token_logprobs"])
    assert scores["text_offset"][0] == 0
    chunks = events(complete(running, logprobs=0, stream=True))
    streamed = [v for c in chunks for v in c["choices"][0]["logprobs"]["token_logprobs"]]
    assert streamed == pytest.approx(scores["token_logprobs"], abs=1e-5)
    content = chat(running, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert len(content) == 12


def test_reasoning_ends_at_the_budget(running: Running):
    found = chat(running, reasoning_budget=4, logit_bias={"13": -100, "11": -100, "3": -100}).json()
    message = found["choices"][0]["message"]
    assert message["reasoning_content"]
    assert message["content"]
    assert "</think>" not in json.dumps(message)
    assert found["usage"]["completion_tokens_details"]["reasoning_tokens"] == 5
    without = chat(running, chat_template_kwargs={"enable_thinking": False}).json()
    assert "reasoning_content" not in without["choices"][0]["message"]


@pytest.fixture
def dictated(running: Running):
    """Sets what the model answers in a chat."""
    yield running.answers.append
    running.answers.clear()


CALL = (
    "Which?\n</think>\nI look.\n<tool_call>\n<function=find>\n<parameter=city>\n12\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n<|im_end|>"
)


def test_calls_reasoning_and_content_come_apart(running: Running, dictated):
    dictated(CALL)
    choice = chat(running, tools=TOOLS).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["reasoning_content"] == "Which?"
    assert choice["message"]["content"] == "I look."
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "find"
    assert json.loads(call["function"]["arguments"]) == {"city": "12", "days": 3}
    # the history of a call and its result goes back to the model
    history = [*HELLO, choice["message"], {"role": "tool", "content": "0", "tool_call_id": "1"}]
    assert chat(running, messages=history, tools=TOOLS).status_code == 200


def test_a_stream_brings_the_same_parts(running: Running, dictated):
    dictated(CALL)
    deltas = [c["choices"][0]["delta"] for c in events(chat(running, tools=TOOLS, stream=True))]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Which?"
    assert "".join(delta.get("content", "") for delta in deltas) == "I look."
    [call] = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert (call["index"], call["function"]["name"]) == (0, "find")


def test_without_tools_a_call_is_text(running: Running, dictated):
    dictated(CALL)
    for changes in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = chat(running, **changes).json()["choices"][0]
        assert "<function=find>" in choice["message"]["content"]
        assert choice["finish_reason"] == "stop"


def test_a_call_that_must_be_begins_the_answer(running: Running):
    for choice in ("required", {"type": "function", "function": {"name": "find"}}):
        message = chat(running, tools=TOOLS, tool_choice=choice, max_tokens=30).json()
        # a model that has learned nothing does not close the call, so it is text
        assert message["choices"][0]["message"]["content"].startswith(
            "<tool_call>\n<function=find>"
        )
    assert "not among" in sentence(
        chat(running, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "no"}})
    )
    assert "there are no tools" in sentence(chat(running, tool_choice="required"))


def test_models_health_and_metrics(running: Running):
    complete(running)
    models = httpx.get(running.url + "/v1/models").json()["data"]
    assert [entry["id"] for entry in models] == ["tiny"]
    assert httpx.get(running.url + "/v1/models/tiny").json() == models[0]
    assert httpx.get(running.url + "/v1/models/other").status_code == 404
    assert httpx.get(running.url + "/health").json() == {"status": "ok"}
    text = httpx.get(running.url + "/metrics").text
    for line in text.splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) .+|[a-z_]+(\{.+\})? [0-9.e+-]+", line), line
    count = re.search(r'requests_total\{path="/v1/completions",status="200"\} (\d+)', text)
    assert count is not None
    assert int(count[1]) > 0


def test_the_page_stands_alone(running: Running):
    response = httpx.get(running.url + "/")
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert not re.findall(r"https?://|innerHTML|document\.write|eval\(", response.text)


@pytest.fixture(scope="module")
def locked(start: Start) -> Running:
    return start(KEY)


@pytest.mark.parametrize("given", [None, "Bearer wrong", "Bearer", KEY, "Bearer a key\xe4"])
def test_a_wrong_key_gets_401(locked: Running, given: str | None):
    headers = {} if given is None else {"Authorization": given.encode("latin-1")}
    for path in ("/v1/models", "/metrics"):
        response = httpx.get(locked.url + path, headers=headers)
        assert response.status_code == 401
        assert "API key" in sentence(response)
    assert httpx.post(locked.url + CHAT, headers=headers, json={}).status_code == 401


def test_the_right_key_opens_all_and_health_needs_none(locked: Running):
    assert httpx.get(locked.url + "/health").status_code == 200
    good = {"Authorization": f"Bearer {KEY}"}
    assert httpx.get(locked.url + "/v1/models", headers=good).status_code == 200


def test_bodies_have_a_limit(running: Running):
    response = complete(running, prompt="x" * LIMITS.body_bytes)
    assert response.status_code == 413
    assert "20,000 bytes" in sentence(response)

    def parts():
        for _ in range(30):
            yield b" " * 1000

    kind = {"Content-Type": "application/json"}
    streamed = httpx.post(running.url + CHAT, content=parts(), headers=kind)
    assert streamed.status_code == 413


def test_what_a_page_of_another_origin_could_send_is_refused(running: Running):
    foreign = httpx.get(running.url + "/v1/models", headers={"Host": "evil.example"})
    assert foreign.status_code == 403
    plain = httpx.post(running.url + CHAT, content=b"{}", headers={"Content-Type": "text/plain"})
    assert plain.status_code == 415
    assert "application/json" in sentence(plain)


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"model": "other"}, 404, "there is no model 'other'"),
        ({"max_tokens": 2000}, 400, "the model takes 2000 together"),
        ({"max_tokns": 2}, 400, "max_tokns is not a known field; did you mean max_tokens?"),
        ({"temperature": "1"}, 400, "temperature = 1 is wrong"),
        ({"temperature": 1e-9}, 400, "at least 0.001"),
        ({"n": 5}, 400, "n = 5 must be at most 4"),
        ({"logit_bias": {"5000": 1}}, 400, "vocabulary has 4096"),
        ({"messages": []}, 400, "messages is empty"),
        ({"messages": [{"role": "user", "content": "<|im_end|>"}]}, 400, "bounds of a turn"),
        ({"top_logprobs": 21}, 400, "top_logprobs = 21"),
        ({"messages": None}, 400, "messages = null is wrong"),
        ({"stop": [""]}, 400, "stop[0] =  is wrong: string should have at least 1 character"),
        ({"stop": 3}, 400, "stop = 3 is wrong: input should be a valid string"),
        ({"stop": ["a"] * 17}, 400, "list should have at most 16 items"),
        ({"tool_choice": {"type": "function"}}, 400, "tool_choice.function is missing; give it"),
        ({"tool_choice": "any"}, 400, "tool_choice = any is wrong: input should be 'none', 'auto'"),
        ({"logit_bias": {"-1": 1}}, 400, "logit_bias = -1 is wrong"),
        ({"tools": [{"type": "function"}]}, 400, "tools[0] does not name a function"),
    ],
)
def test_an_impossible_request_gets_a_sentence(
    running: Running, changes: Json, status: int, words: str
):
    response = chat(running, **changes)
    assert response.status_code == status
    assert words in sentence(response)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([-1], "prompt[0] = -1 is wrong: input should be greater than or equal to 0"),
        ([], "prompt = [] is wrong: list should have at least 1 item"),
        ([[5, -2]], "prompt[0][1] = -2 is wrong: input should be greater than or equal to 0"),
        ([[]], "prompt[0] = [] is wrong: list should have at least 1 item"),
        (3, "prompt = 3 is wrong: input should be a valid string"),
    ],
)
def test_a_wrong_prompt_is_named_by_what_it_comes_nearest_to(
    running: Running, prompt: Any, words: str
):
    response = complete(running, prompt=prompt)
    assert response.status_code == 400
    assert words in sentence(response)


@pytest.mark.parametrize(("method", "path"), [("GET", CHAT), ("POST", "/v1/models")])
def test_a_wrong_method_is_refused_with_the_right_ones(running: Running, method: str, path: str):
    right = {"GET": "POST", "POST": "GET"}[method]
    kind = {"Content-Type": "application/json"}
    response = httpx.request(method, running.url + path, headers=kind)
    assert response.status_code == 405
    assert right in response.headers["Allow"].split(", ")
    assert method not in response.headers["Allow"].split(", ")
    assert sentence(response).startswith(f"{method} is not for '{path}'; use ")
    assert right in sentence(response).partition("; use ")[2]


def test_fields_that_change_nothing_are_taken(running: Running):
    """Clients of OpenAI's send them unasked."""
    idle = {
        "user": "me",
        "safety_identifier": "me",
        "prompt_cache_key": "a",
        "service_tier": "auto",
        "metadata": {"a": "b"},
        "store": False,
    }
    plain, marked = chat(running).json(), chat(running, **idle).json()
    assert marked["choices"] == plain["choices"]
    refused = chat(running, store=True)
    assert sentence(refused) == "store = true is wrong: input should be false."


def test_more_open_answers_than_the_limit_get_429(start: Start):
    small = start(limits=dataclasses.replace(LIMITS, open_answers=3))
    response = complete(small, n=4)
    assert response.status_code == 429
    assert complete(small, n=3).status_code == 200


def test_malformed_requests_get_a_sentence_and_harm_nobody(running: Running):
    shown: list[str] = []
    report = fuzz_server.fuzz(running.url, "tiny", range(200), 16, shown.append)
    assert not report.failures, shown
    assert sum(report.statuses.values()) == 200
    assert report.statuses["400"] > 100
    assert report.statuses["200"] > 5
    assert fuzz_server.is_well(running.url, "tiny")
    running.wait_until_empty()


def test_a_plain_answer_ends_with_its_client(running: Running):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            running.url + CHAT,
            json={
                "model": "tiny",
                "messages": HELLO,
                "max_tokens": 1900,
                "logit_bias": {"11": -100, "3": -100},
            },
            timeout=0.2,
        )
    running.wait_until_empty()
    assert re.search(r"nemotron_canceled_total [1-9]", httpx.get(running.url + "/metrics").text)


def test_the_openai_client_understands_all(running: Running, dictated):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=running.url + "/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        text = (
            client.completions.create(model="tiny", prompt="The first", max_tokens=5)
            .choices[0]
            .text
        )
        assert text
        dictated(CALL)
        asked = {"model": "tiny", "messages": HELLO, "tools": TOOLS}
        message = client.chat.completions.create(**asked).choices[0].message
        assert message.reasoning_content == "Which?"
        assert json.loads(message.tool_calls[0].function.arguments)["city"] == ARGUMENTS["city"]
        parts = list(client.chat.completions.create(**asked, stream=True))
        assert "".join(part.choices[0].delta.content or "" for part in parts) == "I look."
        with pytest.raises(openai.BadRequestError, match="must be at most 4"):
            client.chat.completions.create(model="tiny", messages=HELLO, n=9)
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="other", prompt="a")


def test_curl_reads_a_stream(running: Running):
    body = json.dumps({"model": "tiny", "prompt": "a", "stream": True, "max_tokens": 3})
    words = ["curl", "-sN", running.url + "/v1/completions", "-d", body]
    try:
        done = subprocess.run(
            [*words, "-H", "Content-Type: application/json"], capture_output=True, timeout=60
        )
    except FileNotFoundError:
        pytest.skip("there is no curl")
    assert done.stdout.endswith(b"data: [DONE]\n\n")


def test_an_engine_that_fails_ends_its_streams(start: Start, monkeypatch: pytest.MonkeyPatch):
    broken = start()
    broken.is_broken = True

    def fail() -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(broken.worker.engine, "step", fail)
    response = complete(broken)
    assert response.status_code == 503
    assert "has failed" in sentence(response)
    assert complete(broken).status_code == 503
    assert httpx.get(broken.url + "/health").status_code == 503
    with pytest.raises(RuntimeError, match="planted"):
        broken.worker.done.result()
