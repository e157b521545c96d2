"""What a rank holds of a parameter: what is drawn, saved and loaded by it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

Offsets = tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """The stretches of one dimension of a tensor that a rank holds, side by side in this order."""

    shape: torch.Size
    """Of the whole tensor."""
    dim: int
    ranges: tuple[tuple[int, int], ...]
    """First index of each stretch in the whole, and the first after it."""

    @classmethod
    def whole(cls, shape: torch.Size) -> "Shard":
        """Return the shard that is everything."""
        return cls(shape, 0, ((0, shape[0]),))

    def take(self, whole: Tensor) -> Tensor:
        """Cut the shard out of the whole: a view where it is one stretch, otherwise a copy."""
        assert whole.shape == self.shape, (whole.shape, self.shape)
        stretches = [whole.narrow(self.dim, a, b - a) for a, b in self.ranges]
        return stretches[0] if len(stretches) == 1 else torch.cat(stretches, self.dim)

    def rectangles(
        self, block: Tensor, offsets: Sequence[int] | None = None
    ) -> dict[Offsets, Tensor]:
        """Cut a block of the local tensor into rectangles of the whole.

        The block begins at `offsets` in the local tensor, as a shard of FSDP does; by
        default it is all of it. Returns views by the offsets of their first element in the whole.
        """
        at = tuple(offsets) if offsets is not None else (0,) * block.ndim
        first, last = at[self.dim], at[self.dim] + block.shape[self.dim]
        found, local = dict[Offsets, Tensor](), 0
        for start, stop in self.ranges:
            begin, end = max(first, local), min(last, local + stop - start)
            if begin < end and block.numel():
                begins = (*at[: self.dim], start + begin - local, *at[self.dim + 1 :])
                found[begins] = block.narrow(self.dim, begin - first, end - begin)
            local += stop - start
        return found


class ShardedTensor(torch.Tensor):
    """The whole tensor's shape and dtype, with views of the rectangles that are here.

    It computes nothing. A `DTensor` says by its mesh which one rectangle a rank holds; a rank of a
    tensor-parallel Mamba layer holds several, and the whole has the same name and shape in every
    layout.
    """

    shards: dict[Offsets, Tensor]

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, shards: dict[Offsets, Tensor]
    ) -> "ShardedTensor":
        """Make one of views by the offsets of their first element in the whole."""
        whole = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype)
        whole.shards = shards
        return whole

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> NoReturn:
        raise AssertionError(f"{function} on a tensor of which only shards are here")

    def replaced(self, shards: dict[Offsets, Tensor]) -> "ShardedTensor":
        """Return the same whole around other views."""
        return ShardedTensor(self.shape, self.dtype, shards)


def local_of(tensor: Tensor) -> Tensor:
    """Return what of a tensor is here, sharing its memory, without gradient."""
    detached = tensor.detach()
    # only what has imported this module, which takes a second, can have made such a tensor
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not isinstance(detached, module.DTensor):
        return detached
    local: Tensor = detached.to_local()
    return local


def local_shards(tensor: Tensor) -> dict[Offsets, Tensor]:
    """Return what is here of a tensor, by its offsets; of an ordinary one that is all of it."""
    found = tensor.shards if isinstance(tensor, ShardedTensor) else {(0,) * tensor.ndim: tensor}
    return {offsets: shard for offsets, shard in found.items() if shard.numel()}
