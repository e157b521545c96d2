"""SplitMix64 against its published answers; bits that hang on an element's place alone."""

import math

import pytest
import torch

from nemotron.precision.formats import round_e2m1_stochastically
from nemotron.precision.groups import Groups
from nemotron.precision.random_bits import Draw, words


# First answers of Vigna's splitmix64.c, as Rosetta Code and NumPy's seeding tests list them.
@pytest.mark.parametrize(
    ("seed", "answers"),
    [
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]),
        (
            1234567,
            [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431],
        ),
    ],
)
def test_words_are_the_published_answers(seed: int, answers: list[int]):
    found = words(torch.tensor(seed), torch.arange(4))
    assert [word % (1 << 64) for word in found.tolist()] == answers


def bits(draw: Draw, rows: int, columns: int, stream: int = 0) -> torch.Tensor:
    return draw.bits(rows, columns, stream=stream, device=torch.device("cpu"))


def test_a_part_of_a_matrix_has_the_bits_that_it_has_in_the_whole():
    key = 12
    whole = bits(Draw(key), 40, 37)
    parts = [bits(Draw(key, first), 8, 37) for first in range(0, 40, 8)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(bits(Draw(key), 40, 20), whole[:, :20])
    assert torch.equal(bits(Draw(key, columns=19), 40, 18), whole[:, 19:])
    for other in (
        bits(Draw(13), 40, 37),
        bits(Draw(key + (1 << 63)), 40, 37),
        bits(Draw(key), 40, 37, stream=1),
        bits(Draw(key, 1 << 32), 40, 37),
    ):
        assert (other != whole).float().mean() > 0.95


def test_rows_and_columns_of_any_numbers_have_the_bits_of_their_place():
    whole = bits(Draw(12), 40, 100)
    rows, columns = torch.tensor([30, 7, 39, 8]), torch.tensor([90, 3, 4, 17, 99])
    assert torch.equal(bits(Draw(12, rows, columns), 4, 5), whole[rows][:, columns])
    assert torch.equal(bits(Draw(12, rows), 4, 100), whole[rows])
    with pytest.raises(AssertionError, match="numbers for 3 rows"):
        bits(Draw(12, rows), 3, 100)


def test_rows_keep_their_bits_when_zeros_fill_up_each_experts():
    groups = Groups((3, 0, 5), 4)
    whole = bits(Draw(12, 20), 8, 30)
    for draw in (Draw(12, 20), Draw(12, torch.arange(20, 28))):
        padded = bits(draw.pad(groups), 12, 30)
        assert torch.equal(padded[[0, 1, 2, 4, 5, 6, 7, 8]], whole)
        assert torch.equal(
            padded[[3, 9, 10, 11]], bits(Draw(12, torch.tensor([23, 28, 29, 30])), 4, 30)
        )
    assert torch.equal(bits(Draw(12, 20).pad(Groups((6,), 8)), 8, 30), whole)


def test_every_bit_is_drawn_evenly_and_apart_from_its_neighbors():
    drawn = bits(Draw(3), 1024, 1024)
    planes = torch.stack([(drawn >> place) & 1 for place in range(8)]).double() - 0.5
    # means of a million fair bits, and of products with neighbors along either direction and
    # with the other stream: each within five standard errors of nothing
    other = ((bits(Draw(3), 1024, 1024, stream=1) >> 3) & 1).double() - 0.5
    for plane in planes:
        assert abs(plane.mean()) < 5 * 0.5 / 1024
        for pair in (plane[1:] * plane[:-1], plane[:, 1:] * plane[:, :-1], plane * other,
                     plane[:, 8:] * plane[:, :-8]):  # fmt: skip
            assert abs(pair.mean()) < 5 * 0.25 / pair.numel() ** 0.5


@pytest.mark.parametrize("value", [0.1, 0.4, 1.2, 1.7, 2.6, 3.3, 4.4, 5.9])
def test_rounding_is_unbiased_over_a_million_draws(value: float):
    drawn = bits(Draw(7), 1000, 1000)
    found = round_e2m1_stochastically(torch.full((1000, 1000), value), drawn).double()
    # the rule itself rounds the probability down to 1/256, a known bias of less than that
    step = 0.5 if value < 2 else 1.0 if value < 4 else 2.0
    lower = value // step * step
    expected = lower + step * math.floor(256 * (value - lower) / step) / 256
    error = (found.mean() - expected).item()
    assert abs(error) < 4 * found.std().item() / 1000
    assert abs(found.mean().item() - value) < step / 256 + 4 * found.std().item() / 1000
