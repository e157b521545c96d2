"""Coefficients against the values of the definition, computed apart from our formula."""

import pytest

from nemotron.merge.coefficients import SHAPES, coefficients

K5 = [0.29814, 0.24699, 0.16079, 0.13003, 0.11225, 0.05181]
K10 = [0.21082, 0.17465, 0.11369, 0.09194, 0.07937, 0.07089]
K10 += [0.06466, 0.05984, 0.05596, 0.05275, 0.02543]


@pytest.mark.parametrize("golden", [K5, K10])
def test_the_emulated_decay_has_the_known_coefficients(golden: list[float]):
    tokens = [1000 + 25 * k for k in range(len(golden))]
    assert coefficients("minus_sqrt", tokens) == pytest.approx(golden, abs=6e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_coefficients_are_a_weighted_mean(shape):
    for tokens in ([1, 2], [0, 5, 7, 30], list(range(0, 210, 10))):
        found = coefficients(shape, tokens)
        assert len(found) == len(tokens)
        assert sum(found) == pytest.approx(1, abs=1e-12)
        assert min(found) >= 0


def test_updates_count_as_the_decay_does():
    """The sum of all later coefficients is the mean of the decay while an update was made."""
    tokens = [0, 5, 7, 30]
    found = coefficients("minus_sqrt", tokens)
    for at in range(1, 4):
        low, high = tokens[at - 1] / 30, tokens[at] / 30
        cells = 20_000
        mean = (
            sum(1 - (low + (high - low) * (k + 0.5) / cells) ** 0.5 for k in range(cells)) / cells
        )
        assert sum(found[at:]) == pytest.approx(mean, abs=1e-6)


def test_an_exponential_average_falls_by_its_factor():
    found = coefficients("ema", [1, 2, 3], ema_decay=0.5)
    assert found == pytest.approx([1 / 7, 2 / 7, 4 / 7])


@pytest.mark.parametrize("tokens", [[5], [5, 5], [5, 4]])
def test_a_window_without_rising_tokens_is_refused(tokens: list[int]):
    with pytest.raises(ValueError, match="two checkpoints"):
        coefficients("uniform", tokens)
