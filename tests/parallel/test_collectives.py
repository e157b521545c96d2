"""Collectives with gradients: adjoint to what they do, on uneven and empty parts, too."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemotron.parallel.collectives import all_gather, all_to_all, reduce_scatter
from tests.support.pool import Pool

pytestmark = pytest.mark.distributed


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def gathered(dim: int) -> tuple[Tensor, Tensor]:
    rank, group = dist.get_rank(), dist.group.WORLD
    part = random(2, 3, 5, seed=rank).requires_grad_()
    whole = all_gather(part, dim, group)
    (whole * random(*whole.shape, seed=9 + rank)).sum().backward()
    return whole.detach(), part.grad


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_the_gradient_of_a_gather_is_what_all_ranks_hand_back(pair: Pool, dim: int):
    results = pair.run(gathered, dim)
    whole = torch.cat([random(2, 3, 5, seed=rank) for rank in range(2)], dim)
    summed = sum(random(*whole.shape, seed=9 + rank) for rank in range(2))
    for rank, (found, gradient) in enumerate(results):
        assert torch.equal(found, whole)
        assert torch.equal(gradient, summed.chunk(2, dim)[rank])


def scattered(dim: int) -> tuple[Tensor, Tensor]:
    rank, group = dist.get_rank(), dist.group.WORLD
    whole = random(2, 4, 6, seed=rank).requires_grad_()
    part = reduce_scatter(whole, dim, group)
    (part * random(*part.shape, seed=9 + rank)).sum().backward()
    return part.detach(), whole.grad


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_the_gradient_of_a_scattered_sum_is_the_parts_of_all_ranks(pair: Pool, dim: int):
    results = pair.run(scattered, dim)
    total = sum(random(2, 4, 6, seed=rank) for rank in range(2))
    shape = total.chunk(2, dim)[0].shape
    joined = torch.cat([random(*shape, seed=9 + rank) for rank in range(2)], dim)
    for rank, (part, gradient) in enumerate(results):
        assert torch.equal(part, total.chunk(2, dim)[rank])
        assert torch.equal(gradient, joined)


ROWS = [[2, 0], [3, 1]]
"""Rows that each rank sends to each: one of them nothing to one."""


def exchanged() -> tuple[Tensor, Tensor]:
    rank, group = dist.get_rank(), dist.group.WORLD
    sent, received = ROWS[rank], [row[rank] for row in ROWS]
    own = random(sum(sent), 3, seed=rank).requires_grad_()
    came = all_to_all(own, sent, received, group)
    (came * random(*came.shape, seed=9 + rank)).sum().backward()
    return came.detach(), own.grad


def test_rows_go_to_their_rank_and_gradients_back(pair: Pool):
    (first, first_grad), (second, second_grad) = pair.run(exchanged)
    one, two = random(2, 3, seed=0), random(4, 3, seed=1)
    assert torch.equal(first, torch.cat([one, two[:3]]))
    assert torch.equal(second, two[3:])
    back, other = random(5, 3, seed=9), random(1, 3, seed=10)
    assert torch.equal(first_grad, back[:2])
    assert torch.equal(second_grad, torch.cat([back[2:], other]))
