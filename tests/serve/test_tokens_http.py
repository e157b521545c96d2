"""Texts as tokens and back over HTTP, beside transformers' tokenizer."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from nemotron import __version__
from nemotron.data.chat.template import TEMPLATE
from nemotron.data.tokenizer import Tokenizer
from tests.support.serving import LIMITS, TOOLS, Running

httpx = pytest.importorskip("httpx")

TEXT = "<|im_start|>user\nna\u00efve caf\u00e9 \U0001f9d1<|im_end|>\n"
TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is 3 + 4?"},
    {"role": "assistant", "content": "7"},
    {"role": "user", "content": "And 5?"},
]


@pytest.fixture(scope="module")
def peer(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return AutoTokenizer.from_pretrained(folder)


def post(running: Running, path: str, **body: Any) -> httpx.Response:
    return httpx.post(running.url + path, json=body, timeout=60)


def test_a_text_has_the_tokens_of_transformers(running: Running, peer):
    found = post(running, "/tokenize", model="tiny", prompt=TEXT, return_token_strs=True).json()
    expected = peer(TEXT, add_special_tokens=False)["input_ids"]
    assert found == {
        "count": len(expected),
        "max_model_len": LIMITS.length,
        "tokens": expected,
        "token_strs": peer.convert_ids_to_tokens(expected),
    }
    assert post(running, "/tokenize", prompt="a").json()["token_strs"] is None
    assert post(running, "/tokenize", prompt="").json()["tokens"] == []


def test_the_tokens_with_a_role_are_named(running: Running, peer):
    found = httpx.get(running.url + "/tokenizer_info", timeout=60).json()
    assert set(found) == {
        *("tokenizer_class", "bos_token", "eos_token", "pad_token", "chat_template"),
    }
    assert found["chat_template"] == peer.chat_template
    [end] = post(running, "/tokenize", prompt=found["eos_token"]).json()["tokens"]
    config = running.worker.engine.model.config
    assert end == config.eos_token_id
    [begin] = post(running, "/tokenize", prompt=found["bos_token"]).json()["tokens"]
    assert begin == config.bos_token_id


def test_they_are_those_that_a_completion_reads(running: Running):
    tokens = post(running, "/tokenize", prompt=TEXT).json()["tokens"]
    asked = {"model": "tiny", "max_tokens": 8, "temperature": 0, "logprobs": 1}
    texts, ids = (
        post(running, "/v1/completions", prompt=prompt, **asked).json() for prompt in (TEXT, tokens)
    )
    assert texts["usage"]["prompt_tokens"] == len(tokens)
    assert texts["choices"] == ids["choices"]


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("thinks", [True, False])
def test_a_conversation_has_the_tokens_of_transformers(
    running: Running, peer, opened: bool, thinks: bool
):
    options = {"enable_thinking": thinks}
    found = post(
        *(running, "/tokenize"),
        messages=TALK,
        tools=TOOLS,
        add_generation_prompt=opened,
        chat_template_kwargs=options,
    ).json()
    text = peer.apply_chat_template(
        TALK, TOOLS, add_generation_prompt=opened, tokenize=False, **options
    )
    assert found["tokens"] == peer(text, add_special_tokens=False)["input_ids"]
    if opened:
        asked = {"model": "tiny", "messages": TALK, "tools": TOOLS, "max_tokens": 1}
        answer = post(running, "/v1/chat/completions", chat_template_kwargs=options, **asked).json()
        assert answer["usage"]["prompt_tokens"] == found["count"]


def test_tokens_have_the_text_of_transformers(running: Running, peer):
    tokens = peer(TEXT, add_special_tokens=False)["input_ids"]
    found = post(running, "/detokenize", model="tiny", tokens=tokens).json()
    assert found == {"prompt": peer.decode(tokens)} == {"prompt": TEXT}
    assert post(running, "/detokenize", tokens=[]).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/tokenize", {}, 400, "it must have either prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": TALK}, 400, "either prompt or messages"),
        ("/tokenize", {"prompt": 3}, 400, "prompt = 3 is wrong"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "there is no model 'other'"),
        ("/tokenize", {"prompt": "a", "promt": "a"}, 400, "did you mean prompt?"),
        ("/tokenize", {"messages": []}, 400, "messages is empty"),
        ("/tokenize", {"messages": [{"role": "x"}]}, 400, "messages[0].role is 'x'"),
        ("/tokenize", {"messages": TALK, "continue_final_message": True}, 400, "be false"),
        ("/detokenize", {}, 400, "tokens is missing"),
        ("/detokenize", {"tokens": [3, 4096]}, 400, "tokens[1] = 4096 is not in the vocabulary"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0] = -1 is wrong"),
        ("/detokenize", {"tokens": "a"}, 400, "tokens = a is wrong"),
    ],
)
def test_what_is_impossible_gets_a_sentence(
    running: Running, path: str, body: dict[str, Any], status: int, words: str
):
    response = post(running, path, **body)
    assert response.status_code == status
    assert words in response.json()["error"]["message"]


def test_the_version_is_that_of_the_package(running: Running):
    assert httpx.get(running.url + "/version").json() == {"version": __version__}
