"""Answers that must be JSON of a schema, and log-probabilities of the likeliest tokens."""

import json
from typing import Any

import pytest
import torch

from nemotron.data.tokenizer import Tokenizer
from nemotron.generate.engine import Engine
from nemotron.generate.request import Answer, Request
from nemotron.generate.sampling import Sampling
from nemotron.model.hybrid import HybridLM
from nemotron.serve.grammar import JsonForms
from tests.support.serving import TOOLS, Running

httpx = pytest.importorskip("httpx")
jsonschema = pytest.importorskip("jsonschema")

HELLO = [{"role": "user", "content": "Hello"}]
Json = dict[str, Any]
PLACE: Json = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["river", "town"]},
        "days": {"type": "array", "items": {"enum": [1, 20, 300]}, "maxItems": 3},
    },
    "required": ["city", "kind"],
    "additionalProperties": False,
}
COUNT: Json = {"anyOf": [{"type": "integer", "minimum": 7, "maximum": 4000}, {"type": "null"}]}


def named(schema: Json | bool) -> Json:
    return {"type": "json_schema", "json_schema": {"name": "it", "strict": True, "schema": schema}}


def chat(running: Running, **changes: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 300} | changes
    return httpx.post(running.url + "/v1/chat/completions", json=body, timeout=60)


@pytest.fixture(scope="module")
def forms(tokenizer: Tokenizer) -> JsonForms:
    pytest.importorskip("llguidance")
    return JsonForms(tokenizer, tokenizer.vocab_size, frozenset({3, 11}))


@pytest.mark.usefixtures("forms")
def test_answers_are_json_of_the_schema_in_any_company(running: Running):
    for schema in (PLACE, COUNT):
        settings = {"response_format": named(schema), "reasoning_budget": 5, "seed": 4}
        choices = chat(running, n=4, **settings).json()["choices"]
        assert len({choice["message"]["content"] for choice in choices}) > 1
        for choice in choices:
            assert choice["finish_reason"] == "stop"
            assert choice["message"]["reasoning_content"]
            jsonschema.validate(json.loads(choice["message"]["content"]), schema)
        body = chat(running, stream=True, **settings).text
        events = [json.loads(line[6:]) for line in body.split("\n\n") if line.startswith("data: {")]
        deltas = [event["choices"][0]["delta"] for event in events]
        text = "".join(delta.get("content", "") for delta in deltas)
        assert text == choices[0]["message"]["content"]


@pytest.mark.usefixtures("forms")
def test_completions_and_greedy_answers_have_the_form_too(running: Running):
    body = {"model": "tiny", "prompt": "a", "max_tokens": 200, "temperature": 0}
    free = httpx.post(running.url + "/v1/completions", json=body, timeout=60).json()
    body["response_format"] = named(PLACE)
    held = httpx.post(running.url + "/v1/completions", json=body, timeout=60).json()
    assert held["choices"][0]["finish_reason"] == "stop"
    jsonschema.validate(json.loads(held["choices"][0]["text"]), PLACE)
    assert held["choices"][0]["text"] != free["choices"][0]["text"]
    no_thought = {"enable_thinking": False}
    changes = {"response_format": {"type": "json_object"}, "chat_template_kwargs": no_thought}
    # a model that has learned nothing is cut before the object ends, which is said
    choice = chat(running, seed=1, max_tokens=30, **changes).json()["choices"][0]
    assert choice["message"]["content"].startswith("{")
    assert choice["finish_reason"] == "length"


def written(engine: Engine, request: Request) -> Answer:
    *_, last = engine.run([request])
    return last.answer


def test_reasoning_must_end_and_neighbors_are_free(
    forms: JsonForms, model: HybridLM, tokenizer: Tokenizer
):
    end = tokenizer.id("</think>")
    likes_to_stop = Sampling(0.0, logit_bias={3: 100, 11: 90, end: -100})
    form = forms.form(COUNT, after_reasoning=True)
    prompt = tokenizer.encode("The first")
    engine = Engine(model, {3}, tokenizer=tokenizer)
    assert len(written(engine, Request(prompt, 20, likes_to_stop)).tokens) == 1
    held = written(engine, Request(prompt, 20, likes_to_stop, grammar=form))
    assert held.finish == "length"
    assert not {3, 11, end} & set(held.tokens)
    plain = Request(prompt, 20, Sampling(1.0, seed=5))
    alone = written(engine, plain).tokens
    others = [Request(prompt, 20, Sampling(1.0, seed=6), grammar=form), plain]
    answers = {event.request: event.answer.tokens for event in engine.run(others)}
    assert list(answers.values())[1] == alone


def test_an_answer_that_breaks_the_form_ends(forms: JsonForms, tokenizer: Tokenizer):
    guide = forms.form(PLACE, after_reasoning=False).begin()
    assert all(map(guide.push, tokenizer.encode('{"city":')))
    assert not guide.push(tokenizer.encode("7")[0])
    logits = torch.zeros(tokenizer.vocab_size)
    guide.restrict(logits)
    assert logits.isfinite().nonzero().flatten().tolist() == [3, 11]


@pytest.mark.usefixtures("forms")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"response_format": named({"type": "objct"})}, "cannot be followed: Invalid type: objct."),
        ({"response_format": named({"$ref": "http://a/b"})}, "not fetch"),
        ({"response_format": named({"not": {}})}, 'Unimplemented keys: ["not"]'),
        ({"response_format": named({"enum": ["x" * 400] * 45})}, "at most 16,384"),
        ({"response_format": {"type": "json_schema"}}, 'must be given with the type "json_schema"'),
        ({"response_format": {"type": "xml"}}, "response_format.type = xml is wrong"),
        ({"response_format": named({}) | {"json_schema": {"name": "a"}}}, "schema is missing"),
        ({"response_format": named(PLACE), "tools": TOOLS}, "a call has a form of its own"),
    ],
)
def test_a_form_that_cannot_be_followed_is_refused(running: Running, changes: Json, words: str):
    response = chat(running, **changes)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]
    assert "\n" not in response.json()["error"]["message"]


def test_a_missing_package_is_named(running: Running, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nemotron.serve.translate.is_installed", lambda: False)
    response = chat(running, response_format=named(PLACE))
    assert response.status_code == 400
    assert "pip install 'nemotron-train[serve]'" in response.json()["error"]["message"]
    assert chat(running, response_format={"type": "text"}, max_tokens=2).status_code == 200


def test_the_likeliest_tokens_are_those_of_the_model(
    running: Running, model: HybridLM, tokenizer: Tokenizer
):
    prompt = tokenizer.encode("The first")
    body = {"model": "tiny", "prompt": "The first", "max_tokens": 5, "temperature": 0}
    found = httpx.post(
        running.url + "/v1/completions", json=body | {"logprobs": 3}, timeout=60
    ).json()["choices"][0]["logprobs"]
    tokens = Engine(model, {3}).generate([prompt], 5, Sampling(0.0))[0]
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([[*prompt, *tokens[:-1]]])))[0, len(prompt) - 1 :]
    expected = logits.log_softmax(-1).topk(3)
    for top, values, ids in zip(found["top_logprobs"], *expected, strict=True):
        assert list(top) == [tokenizer.decode([int(i)]) for i in ids]
        assert list(top.values()) == pytest.approx(values.tolist(), abs=1e-4)
    content = chat(running, logprobs=True, top_logprobs=2, temperature=0, max_tokens=4).json()
    for scored in content["choices"][0]["logprobs"]["content"]:
        first, second = scored.pop("top_logprobs")
        assert first == scored
        assert second["logprob"] < first["logprob"]
    refused = chat(running, top_logprobs=2)
    assert refused.status_code == 400
    assert "needs logprobs" in refused.json()["error"]["message"]


def test_every_usual_layout_of_json_is_allowed_and_endless_space_is_not(
    forms: JsonForms, tokenizer: Tokenizer
):
    form = forms.form(PLACE, after_reasoning=False)
    value = {"city": 'Rome\n"é', "kind": "town", "days": [1, 20]}
    for layout in ({}, {"indent": 2}, {"indent": "\t"}, {"separators": (",", ":")}):
        guide = form.begin()
        text = json.dumps(value, ensure_ascii=False, **layout)
        assert all(map(guide.push, [*tokenizer.encode(text), 11])), layout
    guide = form.begin()
    assert not all(map(guide.push, tokenizer.encode("{" + "\n" * 9)))
