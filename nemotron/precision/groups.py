"""Tensors that lie one under another in a matrix and are quantized each for itself."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from nemotron.precision.blocks import block_amax

Sizes = tuple[int, ...]
"""Rows of each tensor: those of each expert, or of the only one."""
AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Weights of experts that are quantized at once, on each kind of device.

It bounds the memory of what lies between. A CPU is fastest with tensors that the allocator keeps
(glibc gives back those above 32 MiB, and each new one costs a fault a page), a GPU with few calls.
"""


@dataclass(frozen=True)
class ExpertChunk:
    """Experts that are quantized at once, and their rows."""

    experts: slice
    rows: slice
    sizes: Sizes


def expert_chunks(sizes: Sizes, weight: Float[Tensor, "E N K"]) -> list[ExpertChunk]:
    """Cut experts with so many rows each, and these weights, into what is quantized at once."""
    count = max(1, AT_ONCE[weight.device.type] // max(1, weight[0].numel()))
    starts = (0, *accumulate(sizes))
    cut = []
    for first in range(0, len(sizes), count):
        own = sizes[first : first + count]
        last = first + len(own)
        cut.append(ExpertChunk(slice(first, last), slice(starts[first], starts[last]), own))
    return cut


@dataclass(frozen=True)
class Groups:
    """Where each tensor's rows are, once zeros fill it up so that no block lies in two of them."""

    sizes: Sizes
    multiple: int = 1
    """Rows of each are filled up to a multiple of this."""

    @cached_property
    def filled(self) -> Sizes:
        """Rows of each with those that fill it up."""
        return tuple(-(-size // self.multiple) * self.multiple for size in self.sizes)

    @cached_property
    def starts(self) -> Sizes:
        """First row of each in the filled matrix."""
        return tuple(accumulate(self.filled, initial=0))[:-1]

    def rows(self, group: int) -> slice:
        """Return a tensor's own rows of the filled matrix."""
        return slice(self.starts[group], self.starts[group] + self.sizes[group])

    def filled_rows(self, group: int, height: int = 1) -> slice:
        """Return a tensor's rows, or rows of blocks, with those that fill it up."""
        start = self.starts[group]
        return slice(start // height, -(-(start + self.filled[group]) // height))

    def offsets(self, device: torch.device) -> Int[Tensor, " R"]:
        """Return for each row where it is in the filled matrix."""
        sizes, filled = torch.tensor(self.sizes), torch.tensor(self.filled)
        moved = (filled - sizes).cumsum(0) - (filled - sizes)
        return (torch.arange(sum(self.sizes)) + moved.repeat_interleave(sizes)).to(device)

    def fill(self, x: Shaped[Tensor, "R *rest"]) -> Shaped[Tensor, "filled *rest"]:
        """Put zeros after each tensor's rows."""
        if self.filled == self.sizes:
            return x
        if len(self.sizes) == 1:
            return F.pad(x, (0, 0) * (x.dim() - 1) + (0, self.filled[0] - self.sizes[0]))
        filled = x.new_zeros(sum(self.filled), *x.shape[1:])
        return filled.index_copy_(0, self.offsets(x.device), x)

    def amax(self, x: Float[Tensor, "filled K"]) -> Float[Tensor, " G"]:
        """Return the largest magnitude of each tensor; 0 where there is nothing."""
        return self.largest(block_amax(x, 1, x.shape[1]), 1)

    def largest(self, blocks: Float[Tensor, "rows columns"], height: int) -> Float[Tensor, " G"]:
        """Return the largest of each tensor's blocks, which are `height` rows high; 0 for none."""
        if len(self.sizes) == 1 and blocks.numel():
            return blocks.amax().view(1)
        lengths = self._heights(height, blocks.device)
        return torch.segment_reduce(blocks.amax(1), "max", lengths=lengths, initial=0)

    def spread(self, values: Shaped[Tensor, " G"], height: int) -> Shaped[Tensor, "rows 1"]:
        """Give each row of blocks the value of its tensor."""
        if len(self.sizes) == 1:
            return values.view(1, 1)
        lengths = self._heights(height, values.device)
        size = sum(self.filled) // height
        return values.repeat_interleave(lengths, output_size=size).unsqueeze(1)

    def _heights(self, height: int, device: torch.device) -> Int[Tensor, " G"]:
        return torch.tensor([rows // height for rows in self.filled], device=device)
