"""Drawing tokens: the distribution, its cuts, and what a seed fixes."""

import math

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nemotron.errors import UserError
from nemotron.generate.sampling import Sampling, Uniforms, adjust, choose

VOCAB = 37


def drawn_shares(logits: torch.Tensor, sampling: Sampling, count: int = 200_000) -> torch.Tensor:
    """Return how often each token comes out over evenly spread uniform numbers."""
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = choose(logits.expand(count, -1), sampling, uniform).tokens
    return torch.bincount(tokens, minlength=logits.shape[-1]) / count


def random_logits() -> torch.Tensor:
    return 3 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("top_k", [None, 1, 5, VOCAB + 3])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.6, 1.0])
def test_shares_are_those_of_transformers_wrappers(top_k: int | None, top_p: float | None) -> None:
    logits = random_logits()
    expected = TemperatureLogitsWarper(1.3)(None, logits[None])
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None:
        expected = TopPLogitsWarper(top_p)(None, expected)
    shares = drawn_shares(logits, Sampling(1.3, top_k, top_p))
    # each token's share is known to one part in `count`, at both of its ends
    assert (shares - expected.softmax(-1)[0]).abs().max() <= 2 / 200_000


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = torch.stack([random_logits(), random_logits().flip(0)])
    assert choose(logits, Sampling(0.0), None).tokens.equal(logits.argmax(-1))


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_tiny_temperature_is_greedy_and_finite(scale: float) -> None:
    logits = scale * random_logits()[None]
    token = choose(logits, Sampling(1e-30, top_p=0.9), torch.tensor([0.999])).tokens
    assert token.equal(logits.argmax(-1))


def test_the_largest_uniform_number_stays_inside_the_cut() -> None:
    almost_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    logits = random_logits()
    kept = logits.topk(4).indices
    assert choose(logits[None], Sampling(1.0, top_k=4), almost_one).tokens.item() in kept
    assert (
        choose(logits[None], Sampling(1.0, top_p=1e-9), almost_one).tokens.item() == logits.argmax()
    )


def test_random_numbers_follow_from_the_seed_and_the_place() -> None:
    expected = torch.rand(200, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    late, numbers = Uniforms(7), Uniforms(7)
    assert late[150] == expected[150]
    assert [numbers[place] for place in range(200)] == expected.tolist()
    assert Uniforms(8)[0] != expected[0]


@pytest.mark.parametrize("min_p", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("top_k", [None, 5])
def test_min_p_is_that_of_transformers(min_p: float, top_k: int | None) -> None:
    logits = random_logits()
    expected = TemperatureLogitsWarper(0.8)(None, logits[None])
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    expected = MinPLogitsWarper(min_p)(None, expected).softmax(-1)[0]
    shares = drawn_shares(logits, Sampling(0.8, top_k, min_p=min_p))
    assert (shares - expected).abs().max() <= 2 / 200_000


@pytest.mark.parametrize(
    "sampling",
    [Sampling(0.0), Sampling(0.7), Sampling(1.3, 9), Sampling(1.0, 20, 0.8), Sampling(min_p=0.1)],
)
def test_the_probability_of_a_token_is_its_share(sampling: Sampling) -> None:
    logits = random_logits()
    uniform = torch.linspace(0, 0.999, 50, dtype=torch.float64)
    choice = choose(logits.expand(50, -1), sampling, uniform)
    shares = drawn_shares(logits, sampling)
    assert (choice.logprobs.exp() - shares[choice.tokens]).abs().max() <= 2 / 200_000


def test_penalties_are_those_of_transformers_and_of_their_formula() -> None:
    logits, prompt, answer = random_logits(), torch.tensor([3, 5, 5]), torch.tensor([7, 5, 7, 7])
    found = adjust(logits, Sampling(repetition_penalty=1.7), prompt, answer)
    seen = torch.cat([prompt, answer])[None]
    assert found.equal(RepetitionPenaltyLogitsProcessor(1.7)(seen, logits[None])[0])
    found = adjust(logits, Sampling(presence_penalty=0.5, frequency_penalty=0.25), prompt, answer)
    expected = logits.clone()
    expected[5] -= 0.5 + 0.25
    expected[7] -= 0.5 + 3 * 0.25
    assert found.equal(expected)
    found = adjust(logits, Sampling(logit_bias={4: 2.5, 9: -math.inf}), prompt, answer)
    assert found[4] == logits[4] + 2.5
    assert found[9] == -math.inf
    assert adjust(logits, Sampling(), prompt, answer[:0]).equal(logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature = -0.1 must be a finite number of at least 0"),
        ({"temperature": float("nan")}, "temperature = nan must be a finite number"),
        ({"temperature": float("inf")}, "temperature = inf must be a finite number"),
        ({"top_k": 0}, "top_k = 0 must be at least 1"),
        ({"top_p": 0.0}, r"top_p = 0.0 must lie in \(0, 1\]"),
        ({"top_p": 1.01}, r"top_p = 1.01 must lie in \(0, 1\]"),
        ({"seed": -1}, "seed = -1 must lie in"),
        ({"min_p": 1.5}, r"min_p = 1.5 must lie in \[0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0 must be a finite number above 0"),
        ({"presence_penalty": math.inf}, "presence_penalty = inf must be a finite number"),
        ({"logit_bias": {3: math.nan}}, "logit_bias of token 3 = nan must be a number below inf"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**settings)
