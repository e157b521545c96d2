"""A rank's part of a tensor: what it takes of the whole, and where its pieces go back."""

import pytest
import torch
from torch import Tensor

from nemotron.parallel.layout import Part

WHOLE = torch.arange(11 * 6).view(11, 6)
PARTS = [
    Part(WHOLE.shape, 0, ((1, 3), (5, 6), (9, 11))),
    Part(WHOLE.shape, 1, ((2, 5),)),
    Part(WHOLE.shape, 1, ((0, 1), (3, 5))),
    Part.whole(WHOLE.shape),
]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_has_the_shape_that_it_says(part: Part):
    assert part.take(WHOLE).shape == part.local_shape


def test_stretches_lie_side_by_side_in_their_order():
    assert torch.equal(PARTS[0].take(WHOLE), WHOLE[[1, 2, 5, 9, 10]])
    assert torch.equal(PARTS[2].take(WHOLE), WHOLE[:, [0, 3, 4]])


def test_the_whole_is_not_copied():
    assert PARTS[3].take(WHOLE).data_ptr() == WHOLE.data_ptr()


def put_back(part: Part, block: Tensor, offsets: tuple[int, ...], target: Tensor) -> None:
    for place, piece in part.pieces(block, offsets).items():
        assert piece.numel()
        box = tuple(slice(a, a + n) for a, n in zip(place, piece.shape, strict=True))
        assert (target[box] == -1).all()
        target[box] = piece


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("size", [1, 2, 4, 20])
def test_shards_of_a_part_go_back_to_their_places(part: Part, dim: int, size: int):
    local, target, start = part.take(WHOLE), torch.full_like(WHOLE, -1), 0
    for shard in [*local.split(size, dim), local.narrow(dim, 0, 0)]:  # ranks too many hold nothing
        put_back(part, shard, (start, 0) if dim == 0 else (0, start), target)
        start += shard.shape[dim]
    expected = torch.full_like(WHOLE, -1)
    for start, stop in part.ranges:
        stretch = (slice(start, stop),) if part.dim == 0 else (slice(None), slice(start, stop))
        expected[stretch] = WHOLE[stretch]
    assert torch.equal(target, expected)


def test_pieces_are_views():
    local = PARTS[0].take(WHOLE).clone()
    for piece in PARTS[0].pieces(local).values():
        piece.zero_()
    assert not local.any()
