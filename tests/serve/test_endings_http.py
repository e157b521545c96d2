"""Fields that other servers have beside OpenAI's: when an answer ends, and what its text shows."""

from typing import Any

import pytest

from nemotron.data.tokenizer import Tokenizer
from tests.support.serving import Running, Start

openai = pytest.importorskip("openai")
HELLO = [{"role": "user", "content": "Hello"}]
FORM = {"type": "json_object"}


@pytest.fixture(scope="module")
def client(running: Running):
    with openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client: Any, count: int = 16, **extra: Any) -> Any:
    return client.completions.create(
        model="tiny", prompt="The first", max_tokens=count, temperature=0, extra_body=extra
    ).choices[0]


def ids(client: Any, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of the likeliest answer, each by its text."""
    texts = client.completions.create(
        model="tiny", prompt="The first", max_tokens=16, temperature=0, logprobs=0
    ).choices[0]
    found = [tokenizer.encode(text) for text in texts.logprobs.tokens]
    assert all(len(tokens) == 1 for tokens in found)
    return [token for [token] in found]


def test_an_answer_ends_at_the_tokens_that_are_named(client, tokenizer: Tokenizer):
    tokens = ids(client, tokenizer)
    end = tokens[5]
    before = tokens[: tokens.index(end)]
    choice = complete(client, stop_token_ids=[end])
    assert choice.text == tokenizer.decode(before)
    assert (choice.finish_reason, choice.stop_reason) == ("stop", end)
    choice = complete(client, stop_token_ids=[end], include_stop_str_in_output=True)
    assert choice.text == tokenizer.decode([*before, end])


def test_no_stop_token_comes_before_the_shortest_answer(client, tokenizer: Tokenizer):
    end = ids(client, tokenizer)[2]
    answers = [
        client.completions.create(
            model="tiny",
            prompt="The first",
            max_tokens=16,
            logprobs=0,
            seed=seed,
            logit_bias={str(end): 100},
            extra_body={"stop_token_ids": [end], "min_tokens": 6},
        )
        for seed in range(3)
    ]
    # the bias makes it the next token wherever it is allowed
    assert [answer.usage.completion_tokens for answer in answers] == [7, 7, 7]
    assert {answer.choices[0].stop_reason for answer in answers} == {end}


def test_a_stop_string_is_named_and_included(client):
    text = complete(client).text
    stop = text[6:9]
    choice = complete(client, stop=["@@@@", stop])
    assert choice.text == text[: text.index(stop)]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
    choice = complete(client, stop=[stop], include_stop_str_in_output=True)
    assert choice.text == text[: text.index(stop)] + stop
    parts = client.completions.create(
        model="tiny", prompt="The first", max_tokens=16, temperature=0, stop=stop, stream=True,
        extra_body={"include_stop_str_in_output": True},
    )  # fmt: skip
    streamed = [part.choices[0] for part in parts]
    assert "".join(part.text for part in streamed) == choice.text
    assert [part.stop_reason for part in streamed] == [None] * (len(streamed) - 1) + [stop]


def test_the_end_of_text_and_of_a_turn_are_ignored(client, tokenizer: Tokenizer):
    turn_end = tokenizer.id("<|im_end|>")
    for end in (3, turn_end):
        bias = {str(end): 100.0}
        given: dict[str, Any] = {"model": "tiny", "messages": HELLO, "logit_bias": bias}
        ended = client.chat.completions.create(**given, max_tokens=5)
        assert (ended.usage.completion_tokens, ended.choices[0].finish_reason) == (1, "stop")
        assert ended.choices[0].stop_reason is None
        named = client.chat.completions.create(
            **given, max_tokens=5, extra_body={"ignore_eos": True, "stop_token_ids": [end]}
        )
        assert (named.choices[0].finish_reason, named.choices[0].stop_reason) == ("stop", end)
        going = client.chat.completions.create(
            **given, max_tokens=5, extra_body={"ignore_eos": True}
        )
        assert (going.usage.completion_tokens, going.choices[0].finish_reason) == (5, "length")


def test_names_of_special_tokens_are_shown(client, tokenizer: Tokenizer):
    think = tokenizer.id("<|im_start|>")
    for shown, text in ((None, ""), (True, ""), (False, "<|im_start|>" * 3)):
        choice = complete(
            client, 3, logit_bias={str(think): 100}, skip_special_tokens=shown, ignore_eos=True
        )
        assert choice.text == text


def test_reasoning_is_split_off_all_the_same(running: Running, client):
    running.answers.append("Why?\n</think>\nSo.<|im_end|>")
    try:
        for skipped in (True, False):
            [choice] = client.chat.completions.create(
                model="tiny", messages=HELLO, extra_body={"skip_special_tokens": skipped}
            ).choices
            assert choice.message.reasoning_content == "Why?"
            assert choice.message.content == "So."
    finally:
        running.answers.clear()


@pytest.mark.parametrize("count", [0, -1])
def test_a_cut_of_zero_or_less_keeps_all_tokens(client, count: int):
    given: dict[str, Any] = {"model": "tiny", "prompt": "The first", "max_tokens": 9, "seed": 4}
    plain, uncut, cut = (
        client.completions.create(**given, extra_body=extra).choices[0].text
        for extra in ({}, {"top_k": count}, {"top_k": 1})
    )
    assert uncut == plain != cut


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"min_tokens": -1}, "min_tokens = -1 is wrong"),
        ({"min_tokens": 17}, "min_tokens = 17 must be from 0 to the 16 tokens of the longest"),
        ({"min_tokens": 1, "response_format": FORM}, "exclude a given form"),
        ({"ignore_eos": True, "response_format": FORM}, "exclude a given form"),
        ({"ignore_eos": "yes"}, "ignore_eos = yes is wrong"),
        ({"stop_token_ids": [4096]}, "stop_token_ids has token 4096, but the model's vocabulary"),
        ({"stop_token_ids": [-1]}, r"stop_token_ids\[0\] = -1 is wrong"),
        ({"stop_token_ids": 3}, "stop_token_ids = 3 is wrong"),
        ({"top_k": -2}, "top_k = -2 is wrong"),
        ({"min_token": 2}, "did you mean min_tokens?"),
        ({"bad_words": ["a"]}, "bad_words is not a known field"),
    ],
)
def test_impossible_ends_get_a_sentence(client, extra: dict[str, Any], words: str):
    with pytest.raises(openai.BadRequestError, match=words):
        complete(client, **extra)


def test_guesses_change_nothing(start: Start, client):
    from nemotron.generate.speculate import Speculation

    guessing = start(speculation=Speculation("lookup", 3, adaptive=False))
    given: dict[str, Any] = {"min_tokens": 12, "stop": ["e"], "include_stop_str_in_output": True}
    with openai.OpenAI(base_url=guessing.url + "/v1", api_key="none") as other:
        assert complete(other, 40, **given).text == complete(client, 40, **given).text
