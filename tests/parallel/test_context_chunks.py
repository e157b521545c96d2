"""Head and tail of a row: every token on one rank, work alike, and the way back."""

import pytest
import torch
from torch import Tensor

from nemotron.parallel.context.chunks import (
    chunks_of,
    holder,
    in_rank_order,
    in_row_order,
    shard,
)


def numbers(*rows: list[int]) -> Tensor:
    """Return document numbers of rows, given the lengths of their documents."""
    return torch.stack(
        [torch.arange(len(row)).repeat_interleave(torch.tensor(row)).int() for row in rows]
    )


def worst(found: list[Tensor], exact: list[Tensor]) -> float:
    """Return the largest difference of any pair, relative to the largest entry of the exact one."""
    ratios = []
    for ours, true in zip(found, exact, strict=True):
        assert ours.shape == true.shape
        assert torch.isfinite(ours).all()
        scale = max(float(true.abs().max()), 1e-30)
        ratios.append(float((ours.double() - true.double()).abs().max()) / scale)
    return max(ratios)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_rank_holds_a_chunk_and_the_one_across_from_it(size: int):
    row = torch.arange(2 * size * 5)[None]
    for rank in range(size):
        own = shard(row, rank, size)[0]
        assert [t.tolist() for t in own.view(2, 5)] == [
            list(range(chunk * 5, chunk * 5 + 5)) for chunk in chunks_of(rank, size)
        ]
        # causal attention costs a rank the sum of its positions
        assert own.sum() * size == row.sum()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_table_of_chunks_names_who_holds_each(size: int):
    for chunk in range(2 * size):
        rank, slot = holder(chunk, size)
        assert chunks_of(rank, size)[slot] == chunk


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("rest", [(), (3,), (2, 5)])
def test_what_the_ranks_hold_is_put_in_order_again(size: int, rest: tuple[int, ...]):
    row = torch.randn(2, 2 * size * 3, *rest)
    ranks = torch.cat([shard(row, rank, size) for rank in range(size)], dim=1)
    assert torch.equal(in_row_order(ranks, size), row)
    assert torch.equal(in_rank_order(row, size), ranks)


def test_a_row_that_does_not_make_equal_chunks_is_refused():
    with pytest.raises(AssertionError, match="18 tokens do not make 4 chunks"):
        shard(torch.zeros(1, 18), 0, 2)
