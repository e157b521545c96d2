"""A server that guesses tokens: the same answers, and an account of the guesses."""

import json
import re

import httpx
import pytest

from nemotron.generate.speculate import Speculation
from tests.support.serving import Running, Start

PROMPT = "one two three one two three one two three one"
WORDS = ["one two three one two three one", "two one", "three one two three one two"]
SCHEMA = {"enum": WORDS}
FORM = {"type": "json_schema", "json_schema": {"name": "words", "schema": SCHEMA}}


@pytest.fixture(scope="module")
def guessing(start: Start) -> Running:
    return start(speculation=Speculation(source="lookup", adaptive=False))


@pytest.fixture(scope="module")
def plain(start: Start) -> Running:
    return start()


def answer(running: Running, **changes: object) -> dict:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 30, "temperature": 0, **changes}
    return httpx.post(running.url + "/v1/completions", json=body, timeout=60).json()


def test_guesses_change_no_answer_and_are_counted(guessing: Running, plain: Running):
    with_guesses, without = answer(guessing), answer(plain)
    assert with_guesses["choices"] == without["choices"]
    details = with_guesses["usage"].pop("completion_tokens_details")
    others = without["usage"].pop("completion_tokens_details")
    assert with_guesses["usage"] == without["usage"]
    assert others["accepted_prediction_tokens"] == others["rejected_prediction_tokens"] == 0
    accepted = details["accepted_prediction_tokens"]
    assert accepted > 0
    text = httpx.get(guessing.url + "/metrics").text
    counts = {
        name: int(re.search(rf"^nemotron_{name}_tokens_total (\d+)$", text, re.M)[1])
        for name in ("draft", "accepted")
    }
    assert counts["accepted"] == accepted
    assert counts["draft"] == accepted + details["rejected_prediction_tokens"]


@pytest.mark.parametrize("temperature", [0, 1])
def test_guesses_stay_within_a_schema(guessing: Running, plain: Running, temperature: float):
    asked = {"response_format": FORM, "max_tokens": 40, "temperature": temperature, "seed": 4}
    found = answer(guessing, **asked)
    assert json.loads(found["choices"][0]["text"]) in WORDS
    details = found["usage"]["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] + details["rejected_prediction_tokens"] > 0
    assert found["choices"] == answer(plain, **asked)["choices"]
