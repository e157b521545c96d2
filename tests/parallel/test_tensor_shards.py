"""A rank's shard of a tensor: what it takes of the whole, and where its rectangles go back."""

import pytest
import torch
from torch import Tensor

from nemotron.parallel.shards import Shard

WHOLE = torch.arange(11 * 6).view(11, 6)
SHARDS = [
    Shard(WHOLE.shape, 0, ((1, 3), (5, 6), (9, 11))),
    Shard(WHOLE.shape, 1, ((2, 5),)),
    Shard(WHOLE.shape, 1, ((0, 1), (3, 5))),
    Shard.whole(WHOLE.shape),
]


def test_stretches_lie_side_by_side_in_their_order():
    assert torch.equal(SHARDS[0].take(WHOLE), WHOLE[[1, 2, 5, 9, 10]])
    assert torch.equal(SHARDS[2].take(WHOLE), WHOLE[:, [0, 3, 4]])


def test_the_whole_is_not_copied():
    assert SHARDS[3].take(WHOLE).data_ptr() == WHOLE.data_ptr()


def put_back(shard: Shard, block: Tensor, offsets: tuple[int, ...], target: Tensor) -> None:
    for at, rectangle in shard.rectangles(block, offsets).items():
        assert rectangle.numel()
        box = tuple(slice(a, a + n) for a, n in zip(at, rectangle.shape, strict=True))
        assert (target[box] == -1).all()
        target[box] = rectangle


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("size", [1, 2, 4, 20])
def test_cuts_of_a_shard_go_back_to_their_offsets(shard: Shard, dim: int, size: int):
    local, target, start = shard.take(WHOLE), torch.full_like(WHOLE, -1), 0
    for cut in [*local.split(size, dim), local.narrow(dim, 0, 0)]:  # ranks too many hold nothing
        put_back(shard, cut, (start, 0) if dim == 0 else (0, start), target)
        start += cut.shape[dim]
    expected = torch.full_like(WHOLE, -1)
    for start, stop in shard.ranges:
        stretch = (slice(start, stop),) if shard.dim == 0 else (slice(None), slice(start, stop))
        expected[stretch] = WHOLE[stretch]
    assert torch.equal(target, expected)


def test_rectangles_are_views():
    local = SHARDS[0].take(WHOLE).clone()
    for rectangle in SHARDS[0].rectangles(local).values():
        rectangle.zero_()
    assert not local.any()
