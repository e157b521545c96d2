"""Where a rank's part of a parameter lies in the whole: what is drawn, saved and loaded by it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """The stretches of one dimension of a tensor that a rank holds, side by side in this order."""

    shape: torch.Size
    """Of the whole tensor."""
    dim: int
    ranges: tuple[tuple[int, int], ...]
    """First index of each stretch in the whole, and the first after it."""

    @classmethod
    def whole(cls, shape: torch.Size) -> "Part":
        """Return the part that is everything."""
        return cls(shape, 0, ((0, shape[0]),))

    @property
    def local_shape(self) -> torch.Size:
        """Shape of what the rank holds."""
        held = sum(stop - start for start, stop in self.ranges)
        return torch.Size([*self.shape[: self.dim], held, *self.shape[self.dim + 1 :]])

    def take(self, whole: Tensor) -> Tensor:
        """Cut the part out of the whole: a view where it is one stretch, otherwise a copy."""
        assert whole.shape == self.shape, (whole.shape, self.shape)
        stretches = [whole.narrow(self.dim, a, b - a) for a, b in self.ranges]
        return stretches[0] if len(stretches) == 1 else torch.cat(stretches, self.dim)

    def pieces(
        self, block: Tensor, offsets: Sequence[int] | None = None
    ) -> dict[tuple[int, ...], Tensor]:
        """Cut a block of the local tensor into rectangles of the whole.

        The block begins at `offsets` in the local tensor, as the shard of a further cut does; by
        default it is all of it. Returns views by the place of their first element in the whole.
        """
        at = tuple(offsets) if offsets is not None else (0,) * block.ndim
        first, last = at[self.dim], at[self.dim] + block.shape[self.dim]
        found, local = dict[tuple[int, ...], Tensor](), 0
        for start, stop in self.ranges:
            begin, end = max(first, local), min(last, local + stop - start)
            if begin < end and block.numel():
                place = (*at[: self.dim], start + begin - local, *at[self.dim + 1 :])
                found[place] = block.narrow(self.dim, begin - first, end - begin)
            local += stop - start
        return found
