"""Drawing tokens: the distribution, its cuts, and what a seed fixes."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from nemotron.errors import UserError
from nemotron.generate.sampling import Sampling, choose, draw_uniforms

VOCAB = 37


def drawn_shares(logits: torch.Tensor, sampling: Sampling, count: int = 200_000) -> torch.Tensor:
    """Return how often each token comes out over evenly spread uniform numbers."""
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = choose(logits.expand(count, -1), sampling, uniform)
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
    assert choose(logits, Sampling(0.0), None).equal(logits.argmax(-1))


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_tiny_temperature_is_greedy_and_finite(scale: float) -> None:
    logits = scale * random_logits()[None]
    token = choose(logits, Sampling(1e-30, top_p=0.9), torch.tensor([0.999]))
    assert token.equal(logits.argmax(-1))


def test_the_largest_uniform_number_stays_inside_the_cut() -> None:
    almost_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    logits = random_logits()
    kept = logits.topk(4).indices
    assert choose(logits[None], Sampling(1.0, top_k=4), almost_one).item() in kept
    assert choose(logits[None], Sampling(1.0, top_p=1e-9), almost_one).item() == logits.argmax()


def test_a_row_draws_the_same_whatever_its_neighbours_are() -> None:
    sampling = Sampling(1.0, seed=7)
    alone = draw_uniforms([[3, 1, 4]], 10, sampling)
    among = draw_uniforms([[1], [3, 1, 4], [5]], 10, sampling)
    assert among[1].equal(alone[0])


def test_copies_of_a_prompt_draw_differently() -> None:
    first, second = draw_uniforms([[3, 1], [3, 1]], 10, Sampling(1.0, seed=7))
    assert not first.equal(second)


def test_without_a_seed_every_call_draws_anew() -> None:
    first, second = (draw_uniforms([[3, 1]], 10, Sampling(1.0)) for _ in range(2))
    assert not first.equal(second)


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
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**settings)
