"""The command: what it prints, and the answers to impossible wishes."""

import copy
from typing import Any

import pytest

from nemotron.data.tokenizer import Tokenizer, load_tokenizer
from nemotron.errors import UserError
from nemotron.generate.command import Continuation, generate
from nemotron.generate.engine import Engine
from nemotron.generate.sampling import Sampling
from nemotron.generate.speculate import Speculation
from nemotron.model.hybrid import HybridLM
from tests.support.writer import build_writer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("embedded")


@pytest.fixture
def model(tokenizer: Tokenizer) -> HybridLM:
    """A tiny model with the embedded vocabulary; the command may change its weights."""
    return build_writer(tokenizer.vocab_size)


def expected_text(model: HybridLM, tokenizer: Tokenizer, prompt: str, count: int) -> str:
    engine = Engine(model, {model.config.eos_token_id})
    ids = tokenizer.encode(prompt, specials=True)
    new = engine.generate([ids], count, Sampling(1.0, seed=9))[0]
    return prompt + tokenizer.decode(new, skip_specials=True)


@pytest.mark.parametrize("stream", [True, False])
def test_prompt_and_continuation_are_printed(
    model: HybridLM, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str], stream: bool
) -> None:
    expected = expected_text(model, tokenizer, "The first", 30)
    code = generate(
        model,
        tokenizer,
        ["The first"],
        Continuation(Sampling(1.0, seed=9), 30, device="cpu"),
        stream=stream,
    )
    output = capsys.readouterr()
    assert code == 0
    assert output.out == expected + "\n"
    assert "tokens/s" in output.err


def test_several_prompts_are_printed_in_order(
    model: HybridLM, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["The first", "A second prompt, longer"]
    expected = [expected_text(model, tokenizer, prompt, 12) for prompt in prompts]
    generate(model, tokenizer, prompts, Continuation(Sampling(1.0, seed=9), 12, device="cpu"))
    assert capsys.readouterr().out == "\n\n".join(expected) + "\n"


def test_an_empty_prompt_is_refused(model: HybridLM, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="prompt 2 is empty; give it at least one token"):
        generate(model, tokenizer, ["a", ""], Continuation(Sampling(0.0), 1, device="cpu"))


def test_the_answer_ends_before_a_stop_string(
    model: HybridLM, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = expected_text(model, tokenizer, "The first", 30)
    stop = whole[20:23]
    wanted = Continuation(Sampling(1.0, seed=9), 30, stop=[stop], device="cpu")
    generate(model, tokenizer, ["The first"], wanted)
    assert capsys.readouterr().out == whole[: whole.index(stop, len("The first"))] + "\n"


def test_the_reasoning_ends_at_its_budget(
    model: HybridLM, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    six, seven = (expected_text(model, tokenizer, "The first", count) for count in (6, 7))
    assert six != seven
    wanted = Continuation(Sampling(1.0, seed=9), 7, reasoning_budget=6, device="cpu")
    generate(model, tokenizer, ["The first"], wanted)
    assert capsys.readouterr().out == six + "\n"  # the closing tag is a special token


def test_names_of_special_tokens_in_a_prompt_are_these_tokens(
    model: HybridLM, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "<|im_start|>user\nThe first<|im_end|>\n"
    assert len(tokenizer.encode(prompt, specials=True)) < len(tokenizer.encode(prompt))
    expected = expected_text(model, tokenizer, prompt, 12)
    wanted = Continuation(Sampling(1.0, seed=9), 12, device="cpu")
    code = generate(model, tokenizer, [prompt], wanted, stream=False)
    assert code == 0
    assert capsys.readouterr().out == expected + "\n"


def test_a_text_ends_at_each_of_the_stop_tokens(
    model: HybridLM, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Engine(model, {model.config.eos_token_id})
    prompt = tokenizer.encode("The first")
    new = engine.generate([prompt], 12, Sampling(1.0, seed=9))[0]
    assert new[5] not in new[:5]
    wanted = Continuation(Sampling(1.0, seed=9), 12, stop_ids=[new[5]], device="cpu")
    code = generate(model, tokenizer, ["The first"], wanted, stream=False)
    assert code == 0
    assert capsys.readouterr().out == "The first" + tokenizer.decode(new[:5]) + "\n"


def test_the_end_of_a_text_is_as_its_options_say(
    model: HybridLM, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    new = Engine(model).generate([tokenizer.encode("The first")], 12, Sampling(1.0, seed=9))[0]
    assert new[5] not in new[:5]

    def written(**options: Any) -> str:
        wanted = Continuation(Sampling(1.0, seed=9), 12, device="cpu", **options)
        own = copy.deepcopy(model)  # the command prepares it for decoding alone
        assert generate(own, tokenizer, ["The first"], wanted, stream=False) == 0
        return capsys.readouterr().out.removeprefix("The first").removesuffix("\n")

    assert written(own_stop_ids=[new[5]]) == tokenizer.decode(new[:5])
    assert written(own_stop_ids=[new[5]], include_stop=True) == tokenizer.decode(new[:6])
    assert written(stop_ids=[new[5]], ignore_eos=True) == tokenizer.decode(new)
    assert written(own_stop_ids=[new[5]], ignore_eos=True) == tokenizer.decode(new[:5])
    longer = written(own_stop_ids=[new[5]], min_new_tokens=12)
    assert longer not in (tokenizer.decode(new), tokenizer.decode(new[:5]))
    assert len(longer) > len(tokenizer.decode(new[:5]))


def test_names_of_special_tokens_are_shown_if_asked_for(
    model: HybridLM, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    bias = {tokenizer.id("<|im_start|>"): 100.0}
    for shown, text in ((False, ""), (True, "<|im_start|>" * 3)):
        sampling = Sampling(0.0, logit_bias=bias)
        wanted = Continuation(sampling, 3, device="cpu", special_tokens=shown)
        own = copy.deepcopy(model)
        assert generate(own, tokenizer, ["The first"], wanted, stream=False) == 0
        assert capsys.readouterr().out == f"The first{text}\n"


def test_speculation_changes_no_text_and_says_what_was_accepted(
    model: HybridLM, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = expected_text(model, tokenizer, "The first", 30)
    guesses = Speculation("lookup", adaptive=False)
    wanted = Continuation(Sampling(1.0, seed=9), 30, speculation=guesses, device="cpu")
    code = generate(model, tokenizer, ["The first"], wanted, stream=True)
    output = capsys.readouterr()
    assert (code, output.out) == (0, expected + "\n")
    assert "tokens a pass" in output.err
    assert "; new 30 tokens, " in output.err
