"""Prompts that lead their answers over HTTP, with log-probabilities beside transformers'."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from nemotron.data.tokenizer import Tokenizer
from nemotron.generate.speculate import Speculation
from nemotron.model.hybrid import HybridLM
from nemotron.serve.echo import begins_of
from tests.support.serving import LIMITS, Running, Start

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")

PROMPT = "The first caf\u00e9 \U0001f9d1 opened"
OTHER = "A second one"
# float32 on both sides, sums in another order; the largest difference seen is 1e-6
CLOSE = 2e-5
Json = dict[str, Any]


@pytest.fixture(scope="module")
def peer(model: HybridLM) -> Any:
    """The same model in transformers."""
    own = model.config
    names = (
        *("vocab_size", "hidden_size", "hybrid_override_pattern", "mamba_num_heads"),
        *("mamba_head_dim", "n_groups", "ssm_state_size", "num_attention_heads"),
        *("num_key_value_heads", "head_dim"),
    )
    config = transformers.NemotronHConfig(
        **{name: getattr(own, name) for name in names}, attn_implementation="eager"
    )
    theirs = transformers.NemotronHForCausalLM(config).eval()
    weights = model.state_dict()
    theirs.load_state_dict({k.replace("backbone.", "model.", 1): v for k, v in weights.items()})
    for module in theirs.modules():
        if hasattr(module, "time_step_limit"):  # transformers clamps it to 0.001 or more
            module.time_step_limit = (0.0, math.inf)
    return theirs


def post(running: Running, **changes: Any) -> httpx.Response:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 5, "temperature": 0} | changes
    return httpx.post(running.url + "/v1/completions", json=body, timeout=60)


def choices(running: Running, **changes: Any) -> list[Json]:
    return post(running, **changes).json()["choices"]


def chunks(running: Running, **changes: Any) -> list[Json]:
    lines = post(running, stream=True, **changes).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-2]]


def refusal(running: Running, **changes: Any) -> str:
    response = post(running, **changes)
    assert response.status_code == 400
    return response.json()["error"]["message"]


def check_scores(found: Json, ids: list[int], peer: Any, tokenizer: Tokenizer, top: int) -> None:
    """Compare the log-probabilities of a whole text with those of transformers."""
    with torch.no_grad():
        expected = peer(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    assert found["tokens"] == [tokenizer.decode([token]) for token in ids]
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    for place in range(1, len(ids)):
        row, own = expected[place - 1], found["token_logprobs"][place]
        assert own == pytest.approx(row[ids[place]].item(), abs=CLOSE)
        best = row.topk(top)
        wanted = {
            tokenizer.decode([int(token)]): value
            for token, value in zip(best.indices, best.values.tolist(), strict=True)
        }
        of_place = found["top_logprobs"][place]
        assert of_place.pop(found["tokens"][place]) == own
        wanted.pop(found["tokens"][place], None)
        assert of_place == pytest.approx(wanted, abs=CLOSE)


def test_prompt_and_answer_have_the_log_probabilities_of_transformers(
    running: Running, tokenizer: Tokenizer, peer
):
    [choice] = choices(running, echo=True, logprobs=2)
    [plain] = choices(running, logprobs=2)
    assert choice["text"] == PROMPT + plain["text"]
    ids = tokenizer.encode(PROMPT)
    new = [tokenizer.encode(text)[0] for text in plain["logprobs"]["tokens"]]
    found = choice["logprobs"]
    check_scores(json.loads(json.dumps(found)), [*ids, *new], peer, tokenizer, 2)
    assert found["text_offset"][len(ids) :] == [
        len(PROMPT) + offset for offset in plain["logprobs"]["text_offset"]
    ]
    for text, begin in zip(found["tokens"], found["text_offset"], strict=True):
        assert choice["text"].startswith(text.replace("\ufffd", ""), begin)


def test_no_token_needs_to_follow(running: Running, tokenizer: Tokenizer, peer):
    response = post(running, echo=True, logprobs=1, max_tokens=0).json()
    [choice] = response["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (
        *(PROMPT, "length"),
        None,
    )
    ids = tokenizer.encode(PROMPT)
    check_scores(choice["logprobs"], ids, peer, tokenizer, 1)
    assert response["usage"]["completion_tokens"] == 0
    assert response["usage"]["total_tokens"] == len(ids)
    [plain] = choices(running, echo=True, max_tokens=0)
    assert (plain["text"], plain["logprobs"]) == (PROMPT, None)


def test_prompts_may_be_tokens_and_many(running: Running, tokenizer: Tokenizer):
    asked = {"echo": True, "logprobs": 1, "max_tokens": 1}
    texts = [PROMPT, OTHER, "<|im_start|>user"]
    alone = [choices(running, prompt=text, **asked)[0] for text in texts]
    ids = [tokenizer.encode(text, specials=True) for text in texts]
    for prompts in (texts, ids):
        found = choices(running, prompt=prompts, n=2, **asked)
        assert [choice["index"] for choice in found] == list(range(6))
        for number, choice in enumerate(found):
            assert choice["text"] == alone[number // 2]["text"]
            expected = alone[number // 2]["logprobs"]["token_logprobs"]
            values = choice["logprobs"].pop("token_logprobs")
            assert values[0] is expected[0] is None
            assert values[1:] == pytest.approx(expected[1:], abs=CLOSE)
    assert len(found[4]["logprobs"]["tokens"]) == len(ids[2]) + 1


def test_the_likeliest_token_has_the_same_number_in_both_lists(running: Running):
    """Whoever compares them, as lm-eval does, sees whether a text is the likeliest."""
    [written] = choices(running, max_tokens=9)
    [found] = choices(running, prompt=PROMPT + written["text"], echo=True, logprobs=1, max_tokens=0)
    scores = found["logprobs"]
    begin = len(PROMPT)
    greedy = [
        own == max(top.values())
        for own, top, at in zip(
            *(scores["token_logprobs"], scores["top_logprobs"], scores["text_offset"]), strict=True
        )
        if at >= begin
    ]
    assert len(greedy) >= 5
    assert all(greedy)


@pytest.mark.parametrize("changes", [{}, {"max_tokens": 0}, {"n": 2, "seed": 3, "temperature": 1}])
@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_stream_begins_with_the_prompt(running: Running, changes: Json, logprobs: int | None):
    asked = {"echo": True, "logprobs": logprobs, **changes}
    whole = choices(running, **asked)
    found: list[list[Json]] = [[] for _ in whole]
    for chunk in chunks(running, **asked):
        found[chunk["index"]].append(chunk)
    for parts, choice in zip(found, whole, strict=True):
        # as with vLLM: the first chunk has the prompt and what follows it
        assert parts[0]["text"].startswith(PROMPT)
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        if logprobs is not None:
            for name, values in choice["logprobs"].items():
                joined = [value for part in parts for value in part["logprobs"][name]]
                assert len(joined) == len(values)
                if name in ("tokens", "text_offset"):
                    assert joined == values


def check_type(body: Json) -> None:
    """Check a body against the type of the client.

    The type lacks the nulls of a first token, and of a piece that is not the last.
    """
    for choice in body["choices"]:
        choice["finish_reason"] = choice["finish_reason"] or "stop"
        for name, value in (("token_logprobs", 0.0), ("top_logprobs", {})):
            values = choice["logprobs"][name]
            choice["logprobs"][name] = [
                value if one is None and at == 0 else one for at, one in enumerate(values)
            ]
    openai.types.Completion.model_validate(body, strict=True)


def test_all_is_of_the_types_of_the_client(running: Running):
    asked: Json = {"model": "tiny", "prompt": [PROMPT, OTHER], "echo": True, "logprobs": 3}
    with openai.OpenAI(base_url=running.url + "/v1", api_key="none") as client:
        found = client.completions.create(**asked, max_tokens=0)
        check_type(found.to_dict())
        assert found.choices[0].text == PROMPT
        scores = found.choices[1].logprobs  # the client lets the nulls pass
        assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.text_offset)
        assert sum(value is None for value in scores.token_logprobs) == 1
        stream = client.completions.create(**asked, max_tokens=2, stream=True)
        texts = ["", ""]
        for chunk in stream:
            check_type(chunk.to_dict())
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts[1].startswith(OTHER)


def test_guesses_change_nothing(start: Start, running: Running):
    guessing = start(speculation=Speculation("lookup", 3))
    asked = {"echo": True, "logprobs": 2, "max_tokens": 6}
    [plain], [found] = choices(running, **asked), choices(guessing, **asked)
    assert found["text"] == plain["text"]
    own, expected = (choice["logprobs"]["token_logprobs"] for choice in (found, plain))
    assert own[0] is expected[0] is None
    assert own[1:] == pytest.approx(expected[1:], abs=CLOSE)


def test_what_is_impossible_gets_a_sentence(start: Start, running: Running):
    assert refusal(running, max_tokens=0) == (
        "max_tokens = 0 leaves no text without echo = true; give at least 1."
    )
    assert "max_tokens = -1 is wrong" in refusal(running, echo=True, max_tokens=-1)
    assert "echo = 1 is wrong" in refusal(running, echo=1)
    length = LIMITS.length
    assert "together; ask for fewer" in refusal(running, echo=True, prompt=[7] * length)
    most = post(running, echo=True, logprobs=0, prompt=[7] * length, max_tokens=0).json()
    assert len(most["choices"][0]["logprobs"]["token_logprobs"]) == length
    small = start(limits=dataclasses.replace(LIMITS, echoed=100))
    asked: Json = {"echo": True, "logprobs": 4, "prompt": [[7] * 10, [7] * 10]}
    assert len(choices(small, **asked)) == 2
    assert refusal(small, **asked, n=2) == (
        "echo would report 200 log-probabilities of prompts; ask for at most 100, with fewer "
        "prompts, or a smaller logprobs or n."
    )
    assert len(choices(small, **{**asked, "logprobs": None}, n=3)) == 6
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "echo": True}
    answer = httpx.post(running.url + "/v1/chat/completions", json=chat, timeout=60)
    assert "echo is not a known field" in answer.json()["error"]["message"]


def test_tokens_begin_where_their_text_does(tokenizer: Tokenizer):
    text = "na\u00efve \U0001f9d1\U0001f9d1 \u4e2d\u6587 caf\u00e9"
    ids = tokenizer.encode(text)
    begins = begins_of(ids, tokenizer)
    assert begins[0] == 0
    assert begins == sorted(begins)
    for token, begin in zip(ids, begins, strict=True):
        alone = tokenizer.decode([token])
        if "\ufffd" not in alone:
            assert text.startswith(alone, begin)
    # bytes that are no text do not take time in proportion to the square of their number
    broken = next(i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]) == "\ufffd")
    decoded: list[int] = []

    class Counting(Tokenizer):
        def decode(self, ids, *, skip_specials: bool = False) -> str:
            decoded.append(len(ids))
            return tokenizer.decode(ids, skip_specials=skip_specials)

    counting = object.__new__(Counting)
    begins = begins_of([broken] * 400, counting)
    assert len(begins) == 400
    assert sum(decoded) < 400 * 40
