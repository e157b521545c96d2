"""What an answer says beside its tokens: text up to a stop string, probabilities, experts."""

import pytest
import torch

from nemotron.data.tokenizer import Tokenizer, load_tokenizer
from nemotron.generate.engine import Engine
from nemotron.generate.request import Answer, Request
from nemotron.generate.sampling import Sampling
from nemotron.generate.speculate import Speculation
from nemotron.model.hybrid import HybridLM
from nemotron.model.router import Routing, routers
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


def answer(model: HybridLM, request: Request, **settings: object) -> Answer:
    return list(Engine(model, **settings).run([request]))[-1].answer


@torch.no_grad()
def scores(model: HybridLM, tokens: list[int]) -> torch.Tensor:
    """Return the logits of each token of an answer, from one pass over the text."""
    logits = model.logits(model(torch.tensor([[*PROMPT, *tokens]])))[0]
    return logits[len(PROMPT) - 1 : -1]


@SPECULATIONS
def test_raw_log_probabilities_are_those_of_one_pass(
    model: HybridLM, speculation: Speculation | None
) -> None:
    sampling = Sampling(0.7, top_k=9, seed=1, frequency_penalty=0.3)
    request = Request(PROMPT, 15, sampling, logprobs=True, forced=(8, 8))
    found = answer(model, request, speculation=speculation)
    assert found.tokens[:2] == [8, 8]
    assert found.forced == [True] * 2 + [False] * 13
    expected = scores(model, found.tokens).log_softmax(-1)
    expected = expected.gather(1, torch.tensor(found.tokens)[:, None])[:, 0]
    # they are computed in float32
    assert (torch.tensor(found.raw_logprobs) - expected).abs().max() <= 1e-6
    assert found.logprobs[:2] == [0.0, 0.0]


def test_log_probabilities_are_of_the_distribution_drawn_from(model: HybridLM) -> None:
    sampling = Sampling(0.7, top_k=9, seed=1, logit_bias={5: 2.0}, presence_penalty=0.8)
    found = answer(model, Request(PROMPT, 15, sampling, logprobs=True))
    for place, logits in enumerate(scores(model, found.tokens)):
        logits[5] += 2.0
        logits[list(set(found.tokens[:place]))] -= 0.8
        kept = (logits / 0.7).topk(9)
        share = kept.values.softmax(-1)[kept.indices == found.tokens[place]]
        assert abs(found.logprobs[place] - share.log().item()) <= 1e-6  # float32


@SPECULATIONS
@pytest.mark.parametrize(
    ("forced", "max_tokens", "num_tokens"),
    # 9 ends an answer: after a draft that is right, before one, and with the first token
    [((), 11, 11), ((7, 8), 3, 3), ((7, 8, 8, 9, 8), 12, 4), ((7, 9), 1, 1), ((9,), 12, 1)],
)
def test_the_experts_are_those_of_one_pass(
    model: HybridLM,
    speculation: Speculation | None,
    forced: tuple[int, ...],
    max_tokens: int,
    num_tokens: int,
) -> None:
    request = Request(
        PROMPT,
        max_tokens,
        Sampling(seed=2, logit_bias={9: -100.0}),
        stop_ids=frozenset([9]),
        forced=forced,
        experts=True,
    )
    found = answer(model, request, speculation=speculation)
    assert len(found.tokens) == num_tokens
    chosen = []

    def keep(module: torch.nn.Module, inputs: object, routing: Routing) -> None:
        chosen.append(routing.experts)

    hooks = [r.register_forward_hook(keep) for r in routers(model.backbone).values()]
    scores(model, found.tokens[:-1])
    for hook in hooks:
        hook.remove()
    assert found.experts is not None
    assert found.experts.dtype == torch.int16
    assert found.experts.shape == (len(PROMPT) + num_tokens - 1, 2, 3)
    assert found.experts.equal(torch.stack(chosen, dim=1).to(torch.int16))
    assert answer(model, Request(PROMPT, 3)).experts is None


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("embedded")


@pytest.fixture(scope="module")
def speaker(tokenizer: Tokenizer) -> HybridLM:
    return build(hybrid_override_pattern="M", vocab_size=tokenizer.vocab_size)


@SPECULATIONS
def test_a_stop_string_ends_the_text_where_it_begins(
    speaker: HybridLM, tokenizer: Tokenizer, speculation: Speculation | None
) -> None:
    settings = {"tokenizer": tokenizer, "speculation": speculation}
    sampling = Sampling(1.0, seed=3)
    whole = answer(speaker, Request(PROMPT, 40, sampling), **settings)
    assert whole.text == tokenizer.decode(whole.tokens, skip_specials=True)
    # across the border of two tokens, and not inside a character of several tokens
    borders = [len(tokenizer.decode(whole.tokens[:k], skip_specials=True)) for k in range(41)]
    place = next(b for b in borders[10:] if whole.text[b - 2 : b + 2].isascii())
    stop = whole.text[place - 2 : place + 2]
    assert len(stop) == 4
    request = Request(PROMPT, 40, sampling, stop=("never there", stop))
    events = list(Engine(speaker, **settings).run([request]))
    found = events[-1].answer
    assert found.finish == "stop"
    assert found.text == whole.text[: whole.text.index(stop)]
    assert "".join(event.text for event in events) == found.text
    assert found.tokens == whole.tokens[: len(found.tokens)]
    assert stop in tokenizer.decode(found.tokens, skip_specials=True)
    assert stop not in tokenizer.decode(found.tokens[:-1], skip_specials=True)
