"""Log-probabilities of prompts are those of one pass over the text, however it is read."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from nemotron.errors import UserError
from nemotron.generate import prompt_scores
from nemotron.generate.engine import Engine
from nemotron.generate.request import Answer, PromptLogprobs, Request
from nemotron.generate.sampling import Sampling
from nemotron.generate.speculate import Speculation
from nemotron.model.hybrid import HybridLM
from tests.support.models import build

LONG = tuple((7 * place + place**2 // 3) % 61 for place in range(45))
PROMPTS = [LONG, LONG[:20], (*LONG[:31], 5, 9), (4,), (4, 11), LONG]
TOP = 3
# float64 log-probabilities, computed in other shapes
CLOSE = {"rtol": 0, "atol": 1e-9}


@pytest.fixture(scope="module")
def model() -> HybridLM:
    """Float64; tests must not change it."""
    return build()


def asked(prompt: Sequence[int], **changes: Any) -> Request:
    return replace(
        Request(tuple(prompt), 4, Sampling(0.0), prompt_logprobs=TOP, logprobs=True), **changes
    )


def answers(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    found: dict[tuple[int, int], Answer] = {}
    for event in engine.run(requests):
        # a stream sends them with the first event
        has_scores = requests[0].prompt_logprobs is not None
        assert not has_scores or event.answer.prompt_logprobs is not None
        if event.finish is not None:
            found[event.request, event.sample] = event.answer
    return [found[key] for key in sorted(found)]


def check(model: HybridLM, prompt: Sequence[int], found: PromptLogprobs | None) -> None:
    with torch.no_grad():
        logprobs = model.logits(model(torch.tensor([prompt])))[0, :-1].log_softmax(-1)
    expected = logprobs.topk(TOP)
    assert found is not None
    own = logprobs.gather(1, torch.tensor(prompt)[1:, None])[:, 0]
    torch.testing.assert_close(found.logprobs.double(), own, **CLOSE)
    torch.testing.assert_close(found.top_logprobs.double(), expected.values, **CLOSE)
    assert torch.equal(found.top_tokens, expected.indices)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefill_tokens": 1},
        {"prefill_tokens": 7},
        {"prefixes": 8, "prefill_tokens": 10},
        {"common_pieces": True, "prefill_tokens": 12, "prefixes": 8},
        {"row_by_row": True, "slots": 2},
        {"fixed_sizes": True, "prefill_tokens": 13, "common_pieces": True},
        {"speculation": Speculation("mtp", 2, adaptive=False)},
        {"mamba_decode": "replay", "prefixes": 8, "prefill_tokens": 10},
        # every text loses its place some time
        {"blocks": 14, "block_size": 4, "slots": 3, "prefill_tokens": 5, "prefixes": 2},
    ],
    ids=str,
)
def test_they_are_those_of_one_pass(
    model: HybridLM, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(prompt_scores, "LOGITS_AT_ONCE", 6)
    engine = Engine(model, **options)
    # prefixes are stored by those that come first, whatever they want
    answers(engine, [asked(prompt, prompt_logprobs=None) for prompt in PROMPTS[::2]])
    for _ in range(2):
        found = answers(engine, [asked(prompt) for prompt in PROMPTS])
        for prompt, answer in zip(PROMPTS, found, strict=True):
            check(model, prompt, answer.prompt_logprobs)
    if options.get("blocks"):
        assert engine.scheduler.num_preempted


def test_stored_beginnings_are_still_used_by_other_requests(model: HybridLM):
    engine = Engine(model, prefixes=8, prefill_tokens=10)
    answers(engine, [asked(LONG)])
    before = engine.timing.prompt_tokens
    answers(engine, [asked(LONG, prompt_logprobs=None)])
    assert engine.timing.prompt_tokens - before < 10
    answers(engine, [asked(LONG)])
    assert engine.timing.prompt_tokens - before > len(LONG)


def test_they_change_no_answer(model: HybridLM):
    plain = answers(Engine(model), [asked(p, prompt_logprobs=None) for p in PROMPTS])
    with_them = answers(Engine(model), [asked(p) for p in PROMPTS])
    assert [answer.tokens for answer in with_them] == [answer.tokens for answer in plain]
    assert all(answer.prompt_logprobs is None for answer in plain)


@pytest.mark.parametrize(
    "options", [{}, {"speculation": Speculation("lookup", 2)}, {"slots": 1}], ids=str
)
def test_an_answer_may_have_no_tokens(model: HybridLM, options: dict[str, Any]):
    engine = Engine(model, **options)
    requests = [
        asked(LONG, max_tokens=0, num_samples=2),
        asked(LONG[:9]),
        asked((4,), max_tokens=0, prompt_logprobs=0),
    ]
    first, second, third, last = answers(engine, requests)
    for answer in (first, second):
        assert (answer.tokens, answer.finish, answer.logprobs) == ([], "length", [])
        check(model, LONG, answer.prompt_logprobs)
    assert len(third.tokens) == 4
    check(model, LONG[:9], third.prompt_logprobs)
    assert last.prompt_logprobs is not None
    assert last.prompt_logprobs.top_tokens.shape == (0, 0)
    assert engine.is_idle
    assert engine.cache.num_free_slots == len(engine.cache.lengths)
    with pytest.raises(UserError, match="max_new_tokens = 0 must be at least 1"):
        engine.submit(asked(LONG, max_tokens=0, prompt_logprobs=None))
    for name in ("prompt_logprobs", "top_logprobs"):
        with pytest.raises(UserError, match=f"{name} = -1 must be at least 0"):
            engine.submit(asked(LONG, **{name: -1}))


def test_an_update_of_the_weights_mixes_no_versions(model: HybridLM):
    other = build(seed=3)
    engine = Engine(model, prefill_tokens=10)
    engine.submit(asked(LONG))
    engine.step()
    engine.update(other, 1)
    events = [event for _ in range(9) for event in engine.step()]
    check(other, LONG, events[-1].answer.prompt_logprobs)


def test_logits_of_a_long_prompt_are_never_all_there(
    model: HybridLM, monkeypatch: pytest.MonkeyPatch
):
    sizes = []
    logits = HybridLM.logits

    def counted(self: HybridLM, hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(hidden.shape[:-1].numel())
        return logits(self, hidden)

    monkeypatch.setattr(HybridLM, "logits", counted)
    monkeypatch.setattr(prompt_scores, "LOGITS_AT_ONCE", 6)
    answers(Engine(model), [asked(LONG)] * 3)
    assert max(sizes) == 6
    assert sum(sizes) >= 3 * (len(LONG) - 1)
