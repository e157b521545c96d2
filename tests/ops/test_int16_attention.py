"""Attention in 16-bit integers: as near as bfloat16, and no query knows of what it does not see."""

from typing import Any

import pytest
import torch
from against_reference import doubled, results
from torch import Tensor

from nemotron.ops.attention import reference

pytest.importorskip("numba", reason="numba is not installed")
from nemotron.ops.attention import int16, numba

SHAPES = [
    *[(1, 1, 1, 1, 1, 8), (2, 63, 63, 4, 2, 32), (1, 700, 700, 6, 2, 20), (2, 5, 80, 4, 4, 64)],
    *[(1, 150, 201, 4, 1, 128), (3, 1, 90, 8, 1, 17), (1, 130, 130, 2, 1, 72)],
]
"""Rows, queries, keys, heads of queries and of keys, size of a head."""


def draw(rows: int, length: int, total: int, heads: int, groups: int, size: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(length + size)
    shapes = [(rows, length, heads, size), *[(rows, total, groups, size)] * 2]
    return [torch.randn(shape, generator=g).bfloat16() for shape in shapes]


def documents(rows: int, total: int) -> Tensor:
    g = torch.Generator().manual_seed(total)
    return (torch.rand(rows, total, generator=g) < 0.05).int().cumsum(1).int()


def errors(inputs: list[Tensor], *rest: Any) -> list[tuple[float, float]]:
    """Return how far y and each gradient are off: integers, and float32 rounded to bfloat16."""
    exact = results(reference, doubled(inputs), *rest)
    found, other = (results(form.attention, inputs, *rest) for form in (int16, numba))
    pairs = []
    for ours, float32, true in zip(found, other, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.isfinite(ours).all()
        size = true.norm() + 1e-30
        first, second = (float((t.double() - true).norm() / size) for t in (ours, float32))
        pairs.append((first, second))
    return pairs


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_as_near_as_bfloat16(shape: tuple[int, ...], with_documents: bool):
    ids = documents(shape[0], shape[2]) if with_documents else None
    for ours, float32 in errors(draw(*shape), ids, None):
        # 1.1 times at most; a value that a query sees alone keeps the place of 2^-12 of its largest
        # number, where float32 keeps all
        assert ours <= 1.15 * float32 + 5e-5


def test_rows_of_unequal_length_and_documents():
    inputs = draw(3, 4, 150, 4, 2, 24)
    lengths = torch.tensor([150, 4, 77])
    for ids in (None, documents(3, 150)):
        for ours, float32 in errors(inputs, ids, lengths):
            assert ours <= 1.15 * float32 + 5e-5
    q, k, v = inputs
    before = results(int16.attention, inputs, None, lengths)
    for row, end in enumerate(lengths):
        k[row, end:], v[row, end:] = torch.nan, torch.inf
    found = results(int16.attention, [q, k, v], None, lengths)
    assert all(map(torch.equal, found, before))


def test_many_small_probabilities_beside_a_large_one():
    # with one power of two for a whole row, four thousand keys that weigh 2^-14 each would vanish
    q, k, v = draw(1, 1, 4096, 1, 1, 32)
    k[:] = 0.0
    k[..., 0] = -14 * 0.693147 * 32**0.5
    k[0, 0, 0, 0] = 0.0
    q[:] = 0.0
    q[..., 0] = 1.0
    v[:] = 1.0
    v[0, 0] = 0.0
    y = int16.attention(q, k, v, None, None).double()
    exact = reference(*doubled([q, k, v]), None, None)  # about a fifth
    assert ((y - exact).abs() <= 2**-7 * exact.abs()).all()


@pytest.mark.parametrize("factor", [300.0, torch.inf, torch.nan])
def test_no_digit_depends_on_what_a_query_does_not_see(factor: float):
    inputs = draw(1, 150, 150, 4, 2, 32)
    before = results(int16.attention, inputs, None, None)
    later = [torch.cat([t[:, :70], t[:, 70:] * factor], dim=1) for t in inputs]
    y = int16.attention(*later, None, None)
    assert torch.equal(y[:, :70], before[0][:, :70])
    ids = (torch.arange(150) >= 70).int()[None]
    if factor == 300:
        one, two = (results(int16.attention, t, ids, None) for t in (inputs, later))
        for first, second in zip(one, two, strict=True):
            assert torch.equal(first[:, :70], second[:, :70])
            assert not torch.equal(first[:, 70:], second[:, 70:])


def test_what_is_not_a_number_reaches_what_sees_it():
    q, k, v = draw(1, 40, 40, 2, 1, 16)
    q[0, 20, 1, 3] = torch.nan
    y = int16.attention(q, k, v, None, None)
    assert y[0, 20, 1].isnan().all()
    assert y.isnan().sum() == 16
    for tensor in (k, v):
        saved, tensor[0, 30, 0, 0] = tensor[0, 30, 0, 0].clone(), torch.nan
        y = int16.attention(q, k, v, None, None)
        assert y[0, 30:, :, 0].isnan().all()
        assert not y[0, :30, 0].isnan().any()
        tensor[0, 30, 0, 0] = saved


def test_a_power_of_two_changes_no_digit():
    q, k, v = draw(1, 90, 90, 4, 2, 32)
    before = results(int16.attention, [q, k, v], None, None)
    for power in (-40, 40):
        factor = 2.0**power
        found = results(int16.attention, [q * factor, k / factor, v * factor], None, None)
        scales = (factor, 1.0, factor**2, 1.0)
        for ours, other, scale in zip(found, before, scales, strict=True):
            assert torch.equal(ours, other * scale)


def test_any_number_of_threads_gives_the_same_bits():
    inputs, before, found = draw(2, 300, 300, 4, 2, 32), torch.get_num_threads(), []
    for threads in (1, 3, 2):
        torch.set_num_threads(threads)
        try:
            found.append(results(int16.attention, inputs, documents(2, 300), None))
        finally:
            torch.set_num_threads(before)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))
