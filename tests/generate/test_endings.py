"""When an answer ends, and what of its end the text shows."""

import dataclasses

import pytest
import torch
from transformers import MinNewTokensLengthLogitsProcessor

from nemotron.data.tokenizer import Tokenizer, load_tokenizer
from nemotron.errors import UserError
from nemotron.generate.engine import Engine
from nemotron.generate.request import Answer, Request
from nemotron.generate.sampling import Sampling
from nemotron.generate.speculate import Speculation
from nemotron.model.hybrid import HybridLM
from tests.support.models import build

PROMPT = (5, 3, 60, 1, 17)
SPECULATIONS = pytest.mark.parametrize(
    "speculation",
    [None, Speculation("mtp", 4, adaptive=False), Speculation("lookup", 3, adaptive=False)],
)


@pytest.fixture(scope="module")
def model() -> HybridLM:
    """Float64; tests must not change it."""
    return build(hybrid_override_pattern="ME*E")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("embedded")


@pytest.fixture(scope="module")
def speaker(tokenizer: Tokenizer) -> HybridLM:
    return build(hybrid_override_pattern="M", vocab_size=tokenizer.vocab_size)


def answer(model: HybridLM, request: Request, stop: set[int] | None = None, **settings) -> Answer:
    return list(Engine(model, stop or set(), **settings).run([request]))[-1].answer


@SPECULATIONS
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stop_tokens_wait_for_the_shortest_answer_as_in_transformers(
    model: HybridLM, temperature: float, speculation: Speculation | None
) -> None:
    sampling = Sampling(temperature, seed=2)
    free = answer(model, Request(PROMPT, 24, sampling), speculation=speculation).tokens
    # most of what the model would write ends the answer, so that the next token always does
    stop = set(free[:12]) | set(range(0, model.config.vocab_size, 3))
    least = 9
    request = Request(
        PROMPT, 24, sampling, stop_ids=frozenset(stop), min_tokens=least, logprobs=True
    )
    found = answer(model, request, {1, 4}, speculation=speculation)
    assert len(found.tokens) > least
    assert not (stop | {1, 4}) & set(found.tokens[:least])
    text = torch.tensor([[*PROMPT, *found.tokens]])
    with torch.no_grad():
        logits = model.logits(model(text))[0, len(PROMPT) - 1 : -1]
    theirs = MinNewTokensLengthLogitsProcessor(len(PROMPT), least, sorted(stop | {1, 4}))
    for place, token in enumerate(found.tokens):
        row = theirs(text[:, : len(PROMPT) + place], logits[None, place].float())[0]
        if temperature == 0:
            assert token == row.argmax()
        else:
            # the engine computes the distribution in float64 from logits in float32
            expected = row.double().log_softmax(-1)[token].item()
            assert found.logprobs[place] == pytest.approx(expected, abs=1e-5)


def test_the_answer_ends_at_the_first_token_that_may_end_it(model: HybridLM) -> None:
    stop = frozenset(range(1, model.config.vocab_size))
    request = Request(PROMPT, 24, Sampling(0.0), stop_ids=stop, min_tokens=7)
    found = answer(model, request)
    assert found.tokens[:7] == [0] * 7
    assert (len(found.tokens), found.finish) == (8, "stop")
    assert found.stop_reason == found.tokens[-1]


def test_without_its_end_of_text_an_answer_ends_at_the_tokens_of_the_request(
    model: HybridLM,
) -> None:
    free = answer(model, Request(PROMPT, 20, Sampling(0.0))).tokens
    end, later = free[2], next(t for t in free[3:] if t not in free[:3])
    request = Request(PROMPT, 20, Sampling(0.0))
    stopped = answer(model, request, {end})
    assert stopped.tokens == free[: free.index(end) + 1]
    assert stopped.stop_reason is None
    request = dataclasses.replace(request, ignore_eos=True)
    assert answer(model, request, {end}).tokens == free
    request = dataclasses.replace(request, stop_ids=frozenset({later}))
    found = answer(model, request, {end})
    assert found.tokens == free[: free.index(later) + 1]
    assert found.stop_reason == later


@SPECULATIONS
def test_a_stop_string_counts_if_it_ends_after_the_shortest_answer(
    speaker: HybridLM, tokenizer: Tokenizer, speculation: Speculation | None
) -> None:
    settings = {"tokenizer": tokenizer, "speculation": speculation}
    request = Request(PROMPT, 40, Sampling(1.0, seed=3))
    whole = answer(speaker, request, **settings)

    def text(count: int) -> str:
        return tokenizer.decode(whole.tokens[:count], skip_specials=True)

    least = next(k for k in range(12, 40) if text(k + 1)[-3:].isascii() and len(text(k + 1)) > 20)
    early, late = text(least)[-3:], text(least + 1)[-3:]
    assert whole.text.find(early) < len(text(least)) - 2
    ended = dataclasses.replace(request, stop=(early,), min_tokens=least)
    later = whole.text.find(early, len(text(least)) - 2)
    assert answer(speaker, ended, **settings).text == whole.text[: later if later >= 0 else None]
    # this one begins in the text of the first tokens, or may
    ended = dataclasses.replace(request, stop=(late,), min_tokens=least)
    found = answer(speaker, ended, **settings)
    assert len(found.tokens) == least + 1
    assert found.text == text(least + 1)[:-3]
    assert (found.finish, found.stop_reason) == ("stop", late)


def test_what_ends_an_answer_is_in_its_text_if_asked_for(
    speaker: HybridLM, tokenizer: Tokenizer
) -> None:
    request = Request(PROMPT, 40, Sampling(1.0, seed=3))
    whole = answer(speaker, request, tokenizer=tokenizer)
    stop = whole.text[20:23]
    place = whole.text.find(stop)
    for included in (False, True):
        ended = dataclasses.replace(request, stop=(stop,), include_stop_str_in_output=included)
        events = list(Engine(speaker, tokenizer=tokenizer).run([ended]))
        assert events[-1].answer.text == whole.text[: place + 3 * included]
        assert "".join(event.text for event in events) == events[-1].answer.text
    end = whole.tokens[8]
    count = whole.tokens.index(end)
    for included in (False, True):
        ended = dataclasses.replace(
            request, stop_ids=frozenset({end}), include_stop_str_in_output=included
        )
        found = answer(speaker, ended, tokenizer=tokenizer)
        assert len(found.tokens) == count + 1
        shown = whole.tokens[: count + included]
        assert found.text == tokenizer.decode(shown, skip_specials=True)


def test_names_of_special_tokens_are_shown_if_asked_for(
    speaker: HybridLM, tokenizer: Tokenizer
) -> None:
    forced = tuple(tokenizer.encode("<think>\nso\n</think>\nYes<|im_end|>", specials=True))
    end = frozenset({tokenizer.id("<|im_end|>")})
    request = Request(PROMPT, len(forced), forced=forced, stop_ids=end)
    shown = dataclasses.replace(request, skip_special_tokens=False)
    both = dataclasses.replace(shown, include_stop_str_in_output=True)
    texts = [answer(speaker, r, tokenizer=tokenizer).text for r in (request, shown, both)]
    assert texts == [
        tokenizer.decode(forced, skip_specials=True),
        tokenizer.decode(forced[:-1]),
        tokenizer.decode(forced),
    ]
    assert texts[2].endswith("<|im_end|>")


class Form:
    """Stands where a grammar would."""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_tokens": -1}, "min_tokens = -1 must be from 0 to the 8 tokens"),
        ({"min_tokens": 9}, "min_tokens = 9 must be from 0 to the 8 tokens"),
        ({"min_tokens": 1, "grammar": Form()}, "exclude a given form of the answer"),
        ({"ignore_eos": True, "grammar": Form()}, "exclude a given form of the answer"),
        ({"min_tokens": 1, "stop_ids": frozenset(range(61))}, "every token ends the answer"),
    ],
)
def test_impossible_ends_are_refused(model: HybridLM, settings: dict, message: str) -> None:
    assert model.config.vocab_size == 61
    with pytest.raises(UserError, match=message):
        Engine(model).submit(Request(PROMPT, 8, **settings))
