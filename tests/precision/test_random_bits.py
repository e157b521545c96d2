"""Philox against the published answers; bits that hang on an element's place alone."""

import math

import pytest
import torch

from nemotron.precision.formats import round_e2m1_stochastically
from nemotron.precision.random_bits import Draw, philox


# Known answers of Random123 1.14 (kat_vectors, philox4x32 10).
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (
            [0xFFFFFFFF] * 4,
            (0xFFFFFFFF, 0xFFFFFFFF),
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, answer):
    assert philox(torch.tensor([counter]), key).tolist() == [answer]


def bits(draw: Draw, rows: int, columns: int, stream: int = 0) -> torch.Tensor:
    return draw.bits(rows, columns, stream=stream, device=torch.device("cpu"))


def test_a_part_of_a_matrix_has_the_bits_that_it_has_in_the_whole():
    key = (1, 2)
    whole = bits(Draw(key), 40, 37)
    parts = [bits(Draw(key, first), 8, 37) for first in range(0, 40, 8)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(bits(Draw(key), 40, 20), whole[:, :20])
    assert torch.equal(bits(Draw(key, columns=19), 40, 18), whole[:, 19:])
    assert torch.equal(bits(Draw(key).part(slice(3, 9)), 6, 37), whole[3:9])
    for other in (
        bits(Draw((1, 3)), 40, 37),
        bits(Draw((2, 2)), 40, 37),
        bits(Draw(key), 40, 37, stream=1),
        bits(Draw(key, 1 << 32), 40, 37),
    ):
        assert (other != whole).float().mean() > 0.95


def test_rows_and_columns_of_any_numbers_have_the_bits_of_their_place():
    whole = bits(Draw((1, 2)), 40, 100)
    rows, columns = torch.tensor([30, 7, 39, 8]), torch.tensor([90, 3, 4, 17, 99])
    assert torch.equal(bits(Draw((1, 2), rows, columns), 4, 5), whole[rows][:, columns])
    assert torch.equal(bits(Draw((1, 2), rows), 4, 100), whole[rows])
    assert torch.equal(bits(Draw((1, 2), rows).part(slice(1, 3)), 2, 100), whole[[7, 39]])
    assert torch.equal(bits(Draw((1, 2), rows[:2]), 4, 100), whole[[30, 7, 8, 9]])
    with pytest.raises(AssertionError, match="4 numbers for 3 rows"):
        bits(Draw((1, 2), rows), 3, 100)


@pytest.mark.parametrize("value", [0.1, 0.4, 1.2, 1.7, 2.6, 3.3, 4.4, 5.9])
def test_rounding_is_unbiased_over_a_million_draws(value: float):
    drawn = bits(Draw((7, 9)), 1000, 1000)
    found = round_e2m1_stochastically(torch.full((1000, 1000), value), drawn).double()
    # the rule itself rounds the probability down to 1/256, a known bias of less than that
    step = 0.5 if value < 2 else 1.0 if value < 4 else 2.0
    lower = value // step * step
    expected = lower + step * math.floor(256 * (value - lower) / step) / 256
    error = (found.mean() - expected).item()
    assert abs(error) < 4 * found.std().item() / 1000
    assert abs(found.mean().item() - value) < step / 256 + 4 * found.std().item() / 1000
