"""Cutting matrices into blocks of rows that stay in a CPU's cache while they are worked on."""

from collections.abc import Iterator

from torch import Tensor

BLOCK_ELEMENTS = 1 << 17
"""Elements of a block: its float32 intermediates are about one core's cache."""


def row_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same rows of all tensors [M, ...]; on a GPU one block is all of them."""
    rows = max(1, tensors[0].shape[0])
    width = max(1, tensors[0].numel() // rows)
    height = max(1, BLOCK_ELEMENTS // width) if tensors[0].device.type == "cpu" else rows
    return zip(*(tensor.split(height) for tensor in tensors), strict=True)
