"""Attention over ranks that share rows: the numbers of one process, in float64 to 12 digits."""

import pytest
import torch
import torch.distributed as dist
from test_context_chunks import numbers, worst
from torch import Tensor

from nemotron.ops.attention import attention, reference
from nemotron.parallel.context.apply import SumOverRow
from nemotron.parallel.context.attention import ContextAttention
from nemotron.parallel.context.chunks import in_row_order, shard
from tests.support.pool import Pool

pytestmark = pytest.mark.distributed

LENGTH = 40
# rows of four chunks of 10 tokens on two ranks, of eight chunks of 5 on four
DOCUMENTS = {
    "none": None,
    "one": ([40], [40]),
    "inside_chunks": ([7, 18, 15], [33, 7]),
    "at_the_edges_of_chunks": ([10, 20, 10], [5, 10, 15, 10]),
    "short": ([1, 2, 1, 1, 1, 3, 2, 1, 28], [1] * 40),
}


def draw(heads: int = 6, kv_heads: int = 2) -> tuple[list[Tensor], Tensor]:
    """Return q, k and v, and a cotangent."""
    g = torch.Generator().manual_seed(heads)
    q, k, v, cotangent = (
        torch.randn(2, LENGTH, number, 4, generator=g, dtype=torch.float64)
        for number in (heads, kv_heads, kv_heads, heads)
    )
    return [t.requires_grad_() for t in (q, k, v)], cotangent


def on_ranks(
    documents: str, heads: tuple[int, int], backend: str, dtype: torch.dtype
) -> list[Tensor]:
    """Return y and the gradients of q, k and v."""
    rank, size = dist.get_rank(), dist.get_world_size()
    inputs, cotangent = draw(*heads)
    own = [shard(t.detach(), rank, size).to(dtype).requires_grad_() for t in inputs]
    rows = DOCUMENTS[documents]
    seq_idx = None if rows is None else shard(numbers(*rows), rank, size)
    bound = attention.bind(backend)
    y = ContextAttention(dist.group.WORLD)(bound, *own, seq_idx=seq_idx)
    return [y.detach(), *torch.autograd.grad(y, own, shard(cotangent, rank, size).to(dtype))]


def compare(
    pool: Pool,
    documents: str,
    heads: tuple[int, int] = (6, 2),
    backend: str = "auto",
    dtype: torch.dtype = torch.float64,
) -> float:
    """Return the largest relative error against the whole row in one process."""
    ranks = pool.run(on_ranks, documents, heads, backend, dtype)
    found = [in_row_order(torch.cat(t, dim=1), pool.world) for t in zip(*ranks, strict=True)]
    inputs, cotangent = draw(*heads)
    rows = DOCUMENTS[documents]
    y = reference(*inputs, None if rows is None else numbers(*rows), None)
    return worst(found, [y.detach(), *torch.autograd.grad(y, inputs, cotangent)])


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_two_ranks_are_one_process(pair: Pool, documents: str, backend: str):
    assert compare(pair, documents, backend=backend) <= 1e-12


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_four_ranks_are_one_process(four: Pool, documents: str):
    assert compare(four, documents) <= 1e-12


@pytest.mark.parametrize("heads", [(4, 4), (5, 1)])
def test_any_sharing_of_key_value_heads_agrees(pair: Pool, heads: tuple[int, int]):
    assert compare(pair, "inside_chunks", heads) <= 1e-12


@pytest.mark.parametrize("documents", ["none", "inside_chunks"])
def test_float32_stays_close_to_float64(four: Pool, documents: str):
    # as each backend has to on one process
    assert compare(four, documents, dtype=torch.float32) <= 5e-6


def disturbed(wanted: int) -> list[Tensor]:
    """Return y of one document before and after all others changed, and its input gradients."""
    rank, size = dist.get_rank(), dist.get_world_size()
    seq_idx = numbers([7, 18, 15])
    inputs, cotangent = draw()
    inside = seq_idx == wanted
    results = []
    for factor in (1.0, -1.5):
        others = torch.where(inside, 1.0, factor)[..., None, None]
        own = [shard((t[:1] * others).detach(), rank, size).requires_grad_() for t in inputs]
        documents = shard(seq_idx, rank, size)
        y = ContextAttention(dist.group.WORLD)(attention, *own, seq_idx=documents)
        counted = shard(cotangent[:1] * inside[..., None, None], rank, size)
        results += [y.detach()[documents == wanted], *torch.autograd.grad(y, own, counted)]
    return [shard(inside, rank, size), *results]


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_nothing_crosses_into_another_document(pair: Pool, wanted: int):
    some = 0
    for inside, y, dq, dk, dv, other_y, *_ in pair.run(disturbed, wanted):
        assert torch.equal(y, other_y)
        for gradient in (dq, dk, dv):
            assert not gradient[~inside].any()
            some += int(gradient[inside].count_nonzero())
    assert some > 0


def summed() -> tuple[Tensor, Tensor]:
    load = torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * (dist.get_rank() + 1)
    return load, SumOverRow(dist.group.WORLD)(load)


def test_the_load_of_experts_is_added_up_and_the_own_is_kept(pair: Pool):
    for rank, (own, total) in enumerate(pair.run(summed)):
        expected = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        assert torch.equal(own, expected * (rank + 1))
        assert torch.equal(total, expected * 3)
